"""What state an engine is in: fresh, restored, trained on, or lost in a load that failed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spotspeed.checkpoint.restore import Restored, Seat
from spotspeed.checkpoint.session import Standing
from spotspeed.errors import CorruptionError


@dataclass(slots=True)
class Progress:
    """Where the state comes from, and what has been made of it since."""

    restored: Restored | None = None
    """What was loaded last, of the job's own checkpoints, as a whole."""
    has_restored: bool = False
    """Whether it is on record where this epoch begins."""
    is_started: bool = False
    """Whether it may have been trained on."""
    is_changed: bool = False
    """Whether the last load had begun to replace the state when it ended."""
    may_differ: bool = False
    """Whether checkpoints of another model are no sign of a mistake at this path."""
    is_prepared: bool = False
    """Whether the engine was attached and restored before the script asked for it."""
    _before: Restored | None = None
    lost: str = ""
    """Why there is no state to train or save, if so."""

    @property
    def may_step_aside(self) -> bool:
        """Whether the checkpoints here, which did not fit, may stay and the engine go elsewhere."""
        return self.may_differ and not self.is_changed

    @property
    def origin(self) -> str | None:
        """The directory of the checkpoint that the state goes back to."""
        return None if self.restored is None else self.restored.directory

    def standing(self) -> Standing | None:
        """The checkpoint that was restored, which holds exactly its step."""
        restored = self.restored
        return None if restored is None else Standing(restored.step, restored.digest)

    def is_on_grid(self, step: int, every: int | None) -> bool:
        """Whether `step` is one of `every` steps, and not the restored one again."""
        first = 0 if self.restored is None else self.restored.step
        return every is not None and step > first and step % every == 0

    def require_state(self) -> None:
        """Raises CorruptionError when there is nothing to train or save."""
        if self.lost:
            raise CorruptionError(self.lost)

    def set_aside(self) -> None:
        """A load begins; `go_back` undoes it."""
        self._before, self.restored = self.restored, None

    def watching(self, seat: Seat) -> Seat:
        """`seat` of a load that is noted here as soon as it begins to replace the state."""
        self.is_changed = False

        def begin() -> None:
            self.is_changed = True
            seat.on_change()

        return replace(seat, on_change=begin)

    def fail(self, error: Exception) -> None:
        """A load has failed, which may have begun to replace the state."""
        if self.is_changed:
            why = f"the state is lost in a failed load: load another, whole checkpoint ({error})"
            self.lost = why

    def go_back(self, error: Exception | None = None) -> bool:
        """Whether the state is what it was, after a load that failed with `error` or did nothing.

        One that was lost before remains so.
        """
        if error is not None:
            self.fail(error)
        if not self.lost:
            self.restored = self._before
        return not self.lost

    def begin_branch(self) -> None:
        """Another state follows, to which no saved one leads so far."""
        self.has_restored = self.is_started = False

    def take(self, restored: Restored | None) -> None:
        """The engine holds exactly `restored` from here on, or what it was made with."""
        self.restored, self.has_restored = restored, True
