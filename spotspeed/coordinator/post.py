"""Carries cut messages of any size over a transport whose messages are small.

A message travels as parts of up to MESSAGE_BYTES_MAX; the first byte of each says whether more
follow. The transport keeps the parts of one sender in order, so that nothing else is needed.
"""

from __future__ import annotations

from spotspeed.coordinator.transport import MESSAGE_BYTES_MAX, Transport
from spotspeed.core.cut_messages import Message, Term, decode, encode
from spotspeed.errors import FormatError

ENCODED_BYTES_MAX = 12 << 20
"""Largest message; below the transport's QUEUE_BYTES_MAX, or it would give up the receiver."""
_PART_BYTES = MESSAGE_BYTES_MAX - 1
_LAST, _MORE = b"\0", b"\1"


class Post:
    """Both directions; belongs to the transport's thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._parts: dict[int, list[bytes]] = {}

    def send(self, to: int, term: Term, message: Message) -> None:
        data = encode(term, message)
        start = 0
        while len(data) - start > _PART_BYTES:
            self._transport.send(to, _MORE + data[start : start + _PART_BYTES])
            start += _PART_BYTES
        self._transport.send(to, _LAST + data[start:])

    def receive(self, sender: int, payload: bytes) -> tuple[Term, Message] | None:
        """The message that `payload` completes; raises FormatError for what is no message."""
        source = f"rank {sender}"
        if payload[:1] not in (_LAST, _MORE):
            raise FormatError(f"{source}: not a part of a message: {payload[:16]!r}")
        parts = self._parts.setdefault(sender, [])
        parts.append(payload[1:])
        if sum(map(len, parts)) > ENCODED_BYTES_MAX:
            raise FormatError(f"{source}: a message of more than {ENCODED_BYTES_MAX} bytes")
        if payload[:1] == _MORE:
            return None
        del self._parts[sender]
        return decode(b"".join(parts), source=source)
