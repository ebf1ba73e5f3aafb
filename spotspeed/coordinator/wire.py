"""One side of one control connection as a pure state machine: bytes in, frames and bytes out.

Opening, with K the job's secret and every MAC an HMAC-SHA256:

    connector -> acceptor  hello      magic[8] source u32 target u32 nonce[16]
    acceptor -> connector  challenge  nonce[16] MAC(K, "challenge" hello nonce)
    connector -> acceptor  response   MAC(K, "response" hello challenge)
    acceptor -> connector  a heartbeat frame: the connection is accepted

Then frames in both directions: `length u32, kind u8, payload[length], tag[16]`, where tag is the
start of MAC(K', number u64, length, kind, payload), `number` counts the frames of a direction, and
K' is derived from K, the direction, and both nonces. All integers are little-endian. A frame that
was changed, repeated, left out or sent by a stranger ends the connection and nothing else.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from dataclasses import dataclass
from enum import Enum, auto

from spotspeed.coordinator.transport import MESSAGE_BYTES_MAX

HEARTBEAT, MESSAGE, GOODBYE = 0, 1, 2

_MAGIC = b"spotctl1"
_NONCE_BYTES = 16
_MAC_BYTES = 32
_TAG_BYTES = 16
_HELLO = struct.Struct(f"<8sII{_NONCE_BYTES}s")
_FRAME_HEAD = struct.Struct("<IB")
_NUMBER = struct.Struct("<Q")
_CHALLENGE_BYTES = _NONCE_BYTES + _MAC_BYTES


class WireError(Exception):
    """The other side broke the protocol or is not of this job; never leaves the transport."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One authenticated frame: `kind` is HEARTBEAT, MESSAGE or GOODBYE."""

    kind: int
    payload: bytes


class _Stage(Enum):
    HELLO = auto()
    CHALLENGE = auto()
    RESPONSE = auto()
    FRAMES = auto()


class Session:
    """The protocol of one connection.

    `target` is the rank that is being connected to, or None on the accepting side, where `peer` is
    known once `is_authenticated`. Bytes to be written are appended to `outgoing`, from which the
    owner removes what it has written.
    """

    def __init__(self, secret: bytes, *, rank: int, world_size: int, target: int | None) -> None:
        self.outgoing = bytearray()
        self.peer = target
        self.is_authenticated = False
        self._secret = secret
        self._rank = rank
        self._world_size = world_size
        self._incoming = bytearray()
        self._transcript = b""
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
        self._is_connector = target is not None
        self._stage = _Stage.HELLO
        if target is not None:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            self._transcript = _HELLO.pack(_MAGIC, rank, target, nonce)
            self.outgoing += self._transcript
            self._stage = _Stage.CHALLENGE

    @property
    def has_answered(self) -> bool:
        """Whether this side has proved itself: from here on the other may believe it connected."""
        return self._stage is _Stage.FRAMES

    def queue(self, kind: int, payload: bytes = b"") -> None:
        """Append one frame to `outgoing`; only once the keys are known."""
        assert self._stage is _Stage.FRAMES
        head = _FRAME_HEAD.pack(len(payload), kind)
        tag = _tag(self._send_key, self._sent, head, payload)
        self._sent += 1
        self.outgoing += head
        self.outgoing += payload
        self.outgoing += tag

    def feed(self, data: bytes) -> list[Frame]:
        """Take received bytes; returns the frames that are now complete, raises WireError."""
        self._incoming += data
        frames: list[Frame] = []
        while self._advance(frames):
            pass
        return frames

    def _advance(self, frames: list[Frame]) -> bool:
        if self._stage is _Stage.FRAMES:
            frame = self._next_frame()
            if frame is None:
                return False
            self.is_authenticated = True
            frames.append(frame)
            return True
        if self._stage is _Stage.HELLO:
            return self._on_hello()
        if self._stage is _Stage.CHALLENGE:
            return self._on_challenge()
        return self._on_response()

    def _on_hello(self) -> bool:
        if bytes(self._incoming[:8]) != _MAGIC[: len(self._incoming)]:
            raise WireError("not a spotspeed control connection")
        if len(self._incoming) < _HELLO.size:
            return False
        if len(self._incoming) > _HELLO.size:
            raise WireError("bytes before the challenge")
        self._transcript = self._take(_HELLO.size)
        _, source, target, _ = _HELLO.unpack(self._transcript)
        if target != self._rank or source >= self._world_size or source == self._rank:
            raise WireError(f"rank {source} asks for rank {target}; this is rank {self._rank}")
        self.peer = source
        challenge = secrets.token_bytes(_NONCE_BYTES)
        challenge += _mac(self._secret, b"challenge", self._transcript, challenge)
        self._transcript += challenge
        self.outgoing += challenge
        self._stage = _Stage.RESPONSE
        return True

    def _on_challenge(self) -> bool:
        if len(self._incoming) < _CHALLENGE_BYTES:
            return False
        challenge = self._take(_CHALLENGE_BYTES)
        nonce, proof = challenge[:_NONCE_BYTES], challenge[_NONCE_BYTES:]
        expected = _mac(self._secret, b"challenge", self._transcript, nonce)
        if not hmac.compare_digest(proof, expected):
            raise WireError("the acceptor does not know the job's secret")
        self._transcript += challenge
        self.outgoing += _mac(self._secret, b"response", self._transcript)
        self._begin_frames()
        return True

    def _on_response(self) -> bool:
        if len(self._incoming) < _MAC_BYTES:
            return False
        expected = _mac(self._secret, b"response", self._transcript)
        if not hmac.compare_digest(self._take(_MAC_BYTES), expected):
            raise WireError("the connector does not know the job's secret")
        self._begin_frames()
        self.is_authenticated = True
        self.queue(HEARTBEAT)
        return True

    def _begin_frames(self) -> None:
        forth = _mac(self._secret, b"connector to acceptor", self._transcript)
        back = _mac(self._secret, b"acceptor to connector", self._transcript)
        keys = (forth, back) if self._is_connector else (back, forth)
        self._send_key, self._receive_key = keys
        self._stage = _Stage.FRAMES

    def _next_frame(self) -> Frame | None:
        if len(self._incoming) < _FRAME_HEAD.size:
            return None
        head = bytes(self._incoming[: _FRAME_HEAD.size])
        length, kind = _FRAME_HEAD.unpack(head)
        if length > MESSAGE_BYTES_MAX or kind > GOODBYE:
            raise WireError(f"a frame of kind {kind} with {length} bytes")
        if len(self._incoming) < _FRAME_HEAD.size + length + _TAG_BYTES:
            return None
        self._take(_FRAME_HEAD.size)
        payload = self._take(length)
        expected = _tag(self._receive_key, self._received, head, payload)
        if not hmac.compare_digest(self._take(_TAG_BYTES), expected):
            raise WireError("a frame that is not authentic")
        self._received += 1
        return Frame(kind, payload)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._incoming[:count])
        del self._incoming[:count]
        return taken


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


def _tag(key: bytes, number: int, head: bytes, payload: bytes) -> bytes:
    return _mac(key, _NUMBER.pack(number), head, payload)[:_TAG_BYTES]
