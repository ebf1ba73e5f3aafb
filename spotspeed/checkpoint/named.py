"""What a save that the user asked for by name carries beside the training state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.core import plain
from spotspeed.core.layout import KIND_WEIGHT, Fragment, TensorKey
from spotspeed.errors import CaptureError, FormatError
from spotspeed.state.piece import Piece, dtype_of
from spotspeed.state.plain_tensors import from_plain, to_plain
from spotspeed.state.provider import StateProvider
from spotspeed.state.set_aside import put_back, set_aside

CLIENT_STATE = "client_state"


@dataclass(frozen=True, slots=True)
class ClientState:
    """A copy of what the caller gave: encoded, but for its large tensors."""

    data: bytes = b""
    """Empty where there is none."""
    tensors: tuple[tuple[Fragment, torch.Tensor], ...] = ()

    def job(self) -> dict[str, Any]:
        """What joins the job's blob."""
        return {CLIENT_STATE: plain.decode(self.data, source=CLIENT_STATE)} if self.data else {}


NOTHING = ClientState()


@dataclass(frozen=True, slots=True)
class NamedSave:
    """One such save, the same on all ranks but for `client_state`, which rank 0 alone has."""

    tag: str
    """The ticket's tag."""
    attempt_prefix: str
    client_state: ClientState = NOTHING
    excludes_frozen: bool = False

    def provider(self, live: StateProvider) -> StateProvider:
        """The state to store of `live`."""
        return _WithoutFrozen(live) if self.excludes_frozen else live


def encode_client_state(client_state: Mapping[str, Any] | None) -> ClientState:
    """A copy of the client state, as it is now, in its stored form.

    Raises CaptureError naming the key path of an object that cannot be stored.
    """
    if not isinstance(client_state, Mapping | None):
        raise CaptureError(f"{CLIENT_STATE}: expected a mapping, found {type(client_state)}")
    value, tensors = set_aside(dict(client_state or {}))
    return ClientState(plain.encode(to_plain(value), what=CLIENT_STATE), tensors)


def decode_client_state(stored: Any, reader: CheckpointReader) -> dict[str, Any]:
    """What `encode_client_state` was given, from the entry of the job's plain data.

    Raises FormatError when it is not one, CorruptionError when a tensor of it is damaged.
    """

    def read(key: TensorKey) -> torch.Tensor:
        tensor = reader.tensors().get(key)
        if tensor is None:
            raise FormatError(f"{CLIENT_STATE}: {key} is not in the checkpoint")
        data = reader.read_bytes(key)
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return flat.view(dtype_of(tensor.dtype)).reshape(tensor.shape)

    client_state = from_plain(put_back({} if stored is None else stored, read))
    if not isinstance(client_state, dict):
        raise FormatError(f"{CLIENT_STATE}: a {type(client_state).__name__}, expected a dict")
    return client_state


class _WithoutFrozen:
    """A provider without the weights that no optimizer trains."""

    def __init__(self, live: StateProvider) -> None:
        self._live = live

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live, name)

    def pieces(self) -> list[Piece]:
        return [piece for piece in self._live.pieces() if not _is_frozen(piece)]


def _is_frozen(piece: Piece) -> bool:
    key: TensorKey = piece.fragment.key
    return key.kind == KIND_WEIGHT and not key.scope
