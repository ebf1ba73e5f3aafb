"""Late state: what a training loop keeps beside the engine, complete when its step has ended.

A loop counts its steps, moves its own schedules and notes its metrics after `engine.step()` has
returned, so at the exit of an update its state is still that of the step before. It is recorded
when the step ends: when the loop says so (`Checkpointer.end_step`, or an integration), when it
saves or closes, or when the next forward begins. A source of data is the opposite case: by then
it has handed out the next batch. So what can be iterated is recorded at the exit of the update.

Each rank records its own, without communication. A save of step S waits for the record of S; when
a notice leaves no time for that, the checkpoint is stored without ("late: absent").
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from spotspeed import events
from spotspeed.core import plain
from spotspeed.errors import CaptureError, ConfigError, FormatError
from spotspeed.state.plain_tensors import from_plain, to_plain

LATE = "late"
"""Key of a rank's stored state that holds its late state."""
GRACE_S = 3.0
"""How long a save waits for a step to end once a notice has come."""
_KEPT = 2

Frozen = Callable[[], bytes]
"""The stored form of one source at one moment; may be asked for later, on another thread."""


class Stateful(Protocol):
    """An object whose state is plain data with tensors, as torch's schedulers and loaders are."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of late state: how it is recorded, in constant time, and how it comes back.

    Without `load` somebody else restores it: a framework, from files of its own.
    """

    freeze: Callable[[], Frozen]
    load: Callable[[Any], Any] | None = None
    is_early: bool = False
    """Recorded at the exit of the update instead."""


@dataclass(slots=True)
class _Record:
    early: dict[str, Frozen]
    late: dict[str, Frozen] | None = None


class LateState:
    """The late state of one rank at the last two steps.

    `add`, `updated`, `end` and `load` belong to the training's thread, the others to any.
    """

    def __init__(self, objects: Mapping[str, Stateful] | None = None) -> None:
        """Raises ConfigError for an object without the two methods, CaptureError for its state."""
        self._sources: dict[str, Source] = {}
        self._records: dict[int, _Record] = {}
        self._changed = threading.Condition()
        self._gives_up_at: float | None = None
        for name, value in (objects or {}).items():
            self.add(name, source_of(name, value))

    def __bool__(self) -> bool:
        """Whether there is anything to record."""
        return bool(self._sources)

    @property
    def loaded(self) -> frozenset[str]:
        """Names of the sources that are restored here."""
        return frozenset(name for name, source in self._sources.items() if source.load)

    def add(self, name: str, source: Source) -> None:
        """Record `source` from now on; what was recorded so far is of too few."""
        source.freeze()()
        with self._changed:
            self._sources[name] = source
            self._records.clear()

    def updated(self, step: int) -> None:
        """The update of `step` is complete; its end is still to come."""
        if self._sources:
            early = self._freeze(is_early=True)
            with self._changed:
                self._records[step] = _Record(early)
                for old in sorted(self._records)[:-_KEPT]:
                    del self._records[old]

    def end(self, step: int) -> None:
        """Step `step` has ended; again is an update of the record."""
        if self._sources:
            late = self._freeze(is_early=False)
            early = None if step in self._records else self._freeze(is_early=True)
            with self._changed:
                record = self._records.setdefault(step, _Record(early or {}))
                record.late = late
                self._changed.notify_all()

    def hurry(self, grace_s: float = GRACE_S) -> None:
        """A notice has come: whoever waits for the end of a step gives up after `grace_s`."""
        with self._changed:
            if self._gives_up_at is None:
                self._gives_up_at = time.monotonic() + grace_s
            self._changed.notify_all()

    def close(self) -> None:
        """No step will end any more."""
        with self._changed:
            self._gives_up_at = 0.0
            self._changed.notify_all()

    def await_end(self, step: int, over: Future[Any]) -> None:
        """Wait until `step` has ended, nobody is to wait any more, or `over` is done."""
        if self._sources:
            over.add_done_callback(lambda _: self._wake())
        with self._changed:
            while self._sources and not self._has_ended(step) and not over.done():
                left_s = None
                if self._gives_up_at is not None:
                    left_s = self._gives_up_at - time.monotonic()
                    if left_s <= 0:
                        return
                self._changed.wait(left_s)

    def stored(self, step: int) -> dict[str, Any]:
        """What joins this rank's stored state; {} when nothing was ever registered.

        {"late": None} stands for "absent": there are sources, and `step` has not ended.
        """
        if not self._sources:
            return {}
        with self._changed:
            record = self._records.get(step)
        if record is None or record.late is None:
            events.emit(events.Lost(f"late state of step {step}", "the step had not ended"))
            return {LATE: None}
        try:
            return {LATE: {name: frozen() for name, frozen in (record.early | record.late).items()}}
        except CaptureError as error:
            events.emit(events.Lost(f"late state of step {step}", str(error)))
            return {LATE: None}

    def check(self, stored: Mapping[str, Any]) -> None:
        """Raise FormatError when `stored` (of a rank) says that late state is absent."""
        if self.loaded and LATE in stored and stored[LATE] is None:
            raise FormatError(
                f"late: absent. It was stored before its step had ended, without the state of "
                f"{', '.join(sorted(self.loaded))}; name its tag to restore the engine alone"
            )

    def load(self, stored: Mapping[str, Any], *, is_own: bool = True) -> list[str]:
        """Give every source its state back; returns, in words, what is not there.

        Without `is_own`, `stored` is of rank 0 of another number of ranks; then a loader's place in
        the data is not this rank's, which is among the words.

        Raises FormatError naming the source that refuses its state.
        """
        found = stored.get(LATE) or {}
        missing = sorted(self.loaded - set(found))
        for name in sorted(self.loaded & set(found)):
            load = self._sources[name].load
            assert load is not None
            state = from_plain(plain.decode(found[name], source=f"state {name!r}"))
            try:
                load(state)
            except Exception as error:  # the user's object may raise anything
                raise FormatError(f"state {name!r}: load_state_dict: {error!r}") from error
        notes = [f"state {name!r} is not in it: left as it is" for name in missing]
        restored = sorted(self.loaded & set(found))
        loaders = [name for name in restored if self._sources[name].is_early]
        if loaders and not is_own:
            notes.append(
                f"{', '.join(map(repr, loaders))}: every rank has the state of rank 0 of another "
                f"number of ranks, so samples of this epoch come twice or not at all; "
                f"checkpointer.batches() goes on exactly"
            )
        return notes

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_ended(self, step: int) -> bool:
        record = self._records.get(step)
        return record is not None and record.late is not None

    def _freeze(self, *, is_early: bool) -> dict[str, Frozen]:
        return {name: source.freeze() for name, source in self._sources.items()
                if source.is_early == is_early}  # fmt: skip


def frozen(value: Any, *, what: str) -> Frozen:
    """`value` as it is now; CaptureError comes out of what is returned, naming `what`."""
    try:
        data = plain.encode(to_plain(value), what=what)
    except CaptureError as refusal:
        error = refusal

        def refuse() -> bytes:
            raise error

        return refuse
    return lambda: data


def source_of(name: str, value: Any) -> Source:
    """How an object of the script's is recorded; ConfigError when it lacks the methods."""
    if not all(callable(getattr(value, method, None))
               for method in ("state_dict", "load_state_dict")):  # fmt: skip
        raise ConfigError(
            f"state {name!r}: a {type(value).__name__} lacks state_dict() or load_state_dict()"
        )
    return Source(
        lambda: frozen(value.state_dict(), what=f"state {name!r}"),
        value.load_state_dict,
        isinstance(value, Iterable) or hasattr(type(value), "__next__"),
    )
