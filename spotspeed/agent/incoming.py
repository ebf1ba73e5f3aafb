"""One rank's part of a save as it arrives: which chunks lie in which slots, and how it ended."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal, Protocol

from spotspeed.core.chunks import StreamLayout
from spotspeed.core.frozen import ObjectRecord
from spotspeed.core.manifest import Ticket
from spotspeed.core.saver_protocol import Begin, Cost
from spotspeed.errors import FormatError, StorageError

State = Literal["arriving", "kept", "written", "sealed", "stored", "failed"]
"""`kept`: this rank's part is durable on the node's own disk; `written`: at the store; `stored`:
and a first attempt to seal found others missing. The last three are settled, as far as this saver's
own work is concerned."""


class StoppedError(StorageError):
    """The save was abandoned, or its rank died before everything was staged."""


@dataclass(slots=True)
class SaveProgress:
    """How far a save is; written by its session's threads, read by the server's."""

    epoch: int
    directory: str
    raw_bytes: int
    written_bytes: int = 0
    state: State = "arriving"
    drained_s: float = 0.0
    """Seconds that the way from the node's disk to the store has taken."""

    @property
    def bytes_left(self) -> int:
        """Bytes that are not yet written, before compression."""
        return 0 if self.is_settled else max(0, self.raw_bytes - self.written_bytes)

    def keep(self, size_bytes: int) -> None:
        """It is durable on the node; `size_bytes` are now to be drained from there."""
        self.raw_bytes, self.written_bytes, self.state = size_bytes, 0, "kept"

    @property
    def is_settled(self) -> bool:
        """Whether this saver has done what it alone can do."""
        return self.state in ("sealed", "stored", "failed")


class Part(Protocol):
    """One rank's part of a save, from a rank or found on the node's disk."""

    @property
    def ticket(self) -> Ticket: ...

    @property
    def progress(self) -> SaveProgress: ...

    @property
    def stopped(self) -> StoppedError | None:
        """Why nobody wants it any more."""

    def pause(self, seconds: float) -> None:
        """Wait between two attempts; raises StoppedError as soon as it is stopped."""


class IncomingSave:
    """A save being received by the reader thread and stored by the writer thread of a session."""

    def __init__(
        self, begin: Begin, layout: StreamLayout, parts: tuple[StreamLayout, ...] = ()
    ) -> None:
        """`layout` is that of all chunks, `parts` those of the frozen objects and of the shard."""
        self.number = begin.save
        self.ticket = begin.ticket
        self.rank = begin.rank
        self.compression = begin.compression
        self.is_direct = begin.is_direct
        self.cost: Cost | None = None
        """What its shard took, once that is durable somewhere."""
        self.layout = layout
        self.parts = parts or (layout,)
        self.new_objects, self.referred = begin.objects, begin.referred
        self.objects: tuple[ObjectRecord, ...] | None = None
        """Frozen objects of the receipt, new ones first; None until all are durable."""
        self.is_promised = False
        """Whether a receipt may exist, so that nothing that it refers to may be removed."""
        self.progress = SaveProgress(begin.ticket.epoch, begin.ticket.directory, layout.raw_bytes)
        self.is_overtaken = False
        """Whether the rank has begun a newer save, which may need this one's memory."""
        self._slots: list[int] = []
        self._has_ended = False
        self.stopped: StoppedError | None = None
        self._changed = threading.Condition()

    def __str__(self) -> str:
        return f"{self.ticket.directory}, rank {self.rank}"

    @property
    def is_urgent(self) -> bool:
        """Whether the machine goes away: nothing is to wait for the training's sake any more."""
        return self.ticket.reason == "notice"

    @property
    def is_staged(self) -> bool:
        """Whether everything has arrived, so that the rank is not needed any more."""
        return self._has_ended

    def add(self, first: int, slots: tuple[int, ...]) -> None:
        """Chunks have come; FormatError when they are not the next ones."""
        with self._changed:
            count = len(self._slots)
            if first != count or count + len(slots) > len(self.layout.chunks) or self._has_ended:
                raise FormatError(
                    f"{self}: chunks [{first}, {first + len(slots)}) came, {count} of "
                    f"{len(self.layout.chunks)} were there"
                )
            self._slots += slots
            self._changed.notify_all()

    def end(self) -> None:
        """Everything has come; FormatError when it has not."""
        with self._changed:
            if len(self._slots) != len(self.layout.chunks):
                raise FormatError(f"{self}: ended after {len(self._slots)} chunks of "
                                  f"{len(self.layout.chunks)}")  # fmt: skip
            self._has_ended = True
            self._changed.notify_all()

    def stop(self, reason: str) -> None:
        """Make every present and later wait raise StoppedError."""
        with self._changed:
            if self.stopped is None:
                self.stopped = StoppedError(f"{self}: {reason}")
            self._changed.notify_all()

    def overtake(self) -> None:
        """The rank has begun a newer save: a pause between two attempts ends."""
        with self._changed:
            self.is_overtaken = True
            self._changed.notify_all()

    def _check(self) -> None:
        if self.stopped is not None:
            raise self.stopped

    def slot(self, chunk: int, *, wait: bool) -> int | None:
        """Where chunk `chunk` lies; waits for it, or returns None when it has not come."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self.stopped or chunk < len(self._slots))
            self._check()
            return self._slots[chunk] if chunk < len(self._slots) else None

    def wait_end(self) -> None:
        """Wait until the rank has said that it is complete."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self._has_ended)
            self._check()

    def pause(self, seconds: float) -> None:
        """Wait between two attempts; raises StoppedError as soon as it is stopped."""
        with self._changed:
            was_overtaken = self.is_overtaken
            self._changed.wait_for(
                lambda: self.stopped or self.is_overtaken is not was_overtaken, seconds
            )
            self._check()
