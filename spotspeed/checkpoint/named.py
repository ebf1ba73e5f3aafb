"""What a save that the user asked for by name carries beside the training state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spotspeed.core import plain
from spotspeed.core.layout import KIND_WEIGHT, TensorKey
from spotspeed.errors import CaptureError
from spotspeed.state.piece import Piece
from spotspeed.state.plain_tensors import to_plain
from spotspeed.state.provider import StateProvider

CLIENT_STATE = "client_state"


@dataclass(frozen=True, slots=True)
class NamedSave:
    """One such save, the same on all ranks but for `client_state`, which rank 0 alone has."""

    tag: str
    """The ticket's tag."""
    attempt_prefix: str
    client_state: bytes = b""
    """The encoded client state; empty on all ranks but 0."""
    excludes_frozen: bool = False

    def extra(self) -> dict[str, Any]:
        """What joins the job's blob."""
        if not self.client_state:
            return {}
        return {CLIENT_STATE: plain.decode(self.client_state, source=CLIENT_STATE)}

    def provider(self, live: StateProvider) -> StateProvider:
        """The state to store of `live`."""
        return _WithoutFrozen(live) if self.excludes_frozen else live


def encode_client_state(client_state: Mapping[str, Any] | None) -> bytes:
    """A copy of the client state, as it is now, in its stored form.

    Raises CaptureError naming the key path of an object that cannot be stored.
    """
    if not isinstance(client_state, Mapping | None):
        raise CaptureError(f"{CLIENT_STATE}: expected a mapping, found {type(client_state)}")
    return plain.encode(to_plain(dict(client_state or {})), what=CLIENT_STATE)


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
