"""Which bytes go where: the geometry of a raw stream as arrays, and the copies that fill slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spotspeed.core.chunks import ENTRY_ALIGNMENT, ChunkSpan, StreamLayout
from spotspeed.staging.devices import Copies, DeviceQueue, Pending
from spotspeed.staging.native import CopyEngine, CopyHandle
from spotspeed.staging.sources import DeviceSource, Source

if TYPE_CHECKING:
    import torch

Numbers = npt.NDArray[np.int64]
_ZEROS = np.zeros(ENTRY_ALIGNMENT, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where each entry of a raw stream begins, its size, and the position of its source."""

    raw_offsets: Numbers
    sizes: Numbers
    sources: Numbers

    @classmethod
    def of(cls, layout: StreamLayout) -> Geometry:
        """That of one layout; made once for all saves of the same fragments."""
        entries, count = layout.entries, len(layout.entries)
        return cls(
            np.fromiter((entry.raw_offset for entry in entries), np.int64, count),
            np.fromiter((entry.fragment.size_bytes for entry in entries), np.int64, count),
            np.fromiter(layout.sources, np.int64, count),
        )

    def then(self, other: Geometry, *, raw_bytes: int, source_count: int) -> Geometry:
        """This one, of a layout of `raw_bytes` from `source_count` sources, and one behind it."""
        return Geometry(
            np.concatenate((self.raw_offsets, other.raw_offsets + raw_bytes)),
            np.concatenate((self.sizes, other.sizes)),
            np.concatenate((self.sources, other.sources + source_count)),
        )


class Origin:
    """A save's raw stream in the training's memory: its geometry, with the addresses of now.

    `places` has the number of the queue of each entry's source, -1 for host memory.
    """

    def __init__(self, geometry: Geometry, sources: Sequence[Source]) -> None:
        count = len(sources)
        self.sources, self.order = sources, geometry.sources
        self.starts = geometry.raw_offsets
        self.stops = geometry.raw_offsets + geometry.sizes
        addresses = np.fromiter((source.address for source in sources), np.uint64, count)
        self.addresses = addresses[self.order]
        self.queues: list[DeviceQueue] = []
        self.places = np.fromiter(map(self._place, sources), np.int16, count)[self.order]

    def _place(self, source: Source) -> int:
        if not isinstance(source, DeviceSource):
            return -1
        if source.queue not in self.queues:
            self.queues.append(source.queue)
        return self.queues.index(source.queue)


class CopyPlan:
    """Copies that fill slots with chunks; bytes of a chunk that belong to no entry become zero."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._zeros: list[Copies] = []
        self._host: list[Copies] = []
        self._device: list[list[tuple[Copies, Numbers]]] = [[] for _ in origin.queues]

    def add(self, chunk: ChunkSpan, address: int) -> None:
        """Fill the memory at `address` with `chunk`."""
        origin = self._origin
        first = max(0, int(origin.starts.searchsorted(chunk.raw_offset, side="right")) - 1)
        stop = int(origin.starts.searchsorted(chunk.raw_stop, side="left"))
        starts = np.maximum(origin.starts[first:stop], chunk.raw_offset)
        stops = np.maximum(np.minimum(origin.stops[first:stop], chunk.raw_stop), starts)
        self._clear(chunk, address, starts, stops)
        rows = np.empty((stop - first, 3), dtype=np.uint64)
        rows[:, 0] = origin.addresses[first:stop] + (starts - origin.starts[first:stop]).astype(
            np.uint64
        )
        rows[:, 1] = (starts - chunk.raw_offset).astype(np.uint64) + np.uint64(address)
        rows[:, 2] = stops - starts
        places = origin.places[first:stop]
        if not origin.queues:
            self._host.append(rows)
            return
        self._host.append(rows[places < 0])
        for number, found in enumerate(self._device):
            (chosen,) = np.nonzero((places == number) & (stops > starts))
            if len(chosen):
                found.append((rows[chosen], origin.order[first:stop][chosen]))

    def run(self, engine: CopyEngine, begun: Callable[[CopyHandle], None]) -> None:
        """Copy, on the calling thread and those of `engine`, without the GIL; `begun` hears of it.

        Whoever has the handle may help by waiting for it. After an error, too, nothing more
        arrives: the slots may be others' then.
        """
        pending: list[Pending] = []
        try:
            self._begin_device(engine, pending)
            if self._host:
                handle = engine.submit(np.concatenate(self._host))
                begun(handle)
                handle.wait()
        finally:
            _await_all(pending)

    def _begin_device(self, engine: CopyEngine, pending: list[Pending]) -> None:
        origin = self._origin
        if self._zeros:  # Before the rest: a device's copies may write the same zeros.
            engine.submit(np.concatenate(self._zeros)).wait()
        for queue, found in zip(origin.queues, self._device, strict=True):
            if found:
                numbers = np.concatenate([number for _, number in found]).tolist()
                tensors = [_tensor(origin.sources[number]) for number in numbers]
                pending.append(queue.submit(np.concatenate([rows for rows, _ in found]), tensors))

    def _clear(self, chunk: ChunkSpan, address: int, starts: Numbers, stops: Numbers) -> None:
        """Zero what lies between entries and behind the last: less than an entry's alignment."""
        ends = np.append(starts, chunk.raw_stop)
        begins = np.concatenate(([chunk.raw_offset], stops))
        (gaps,) = np.nonzero(ends > begins)
        if len(gaps):
            rows = np.empty((len(gaps), 3), dtype=np.uint64)
            rows[:, 0] = _ZEROS.ctypes.data
            rows[:, 1] = (begins[gaps] - chunk.raw_offset).astype(np.uint64) + np.uint64(address)
            rows[:, 2] = sizes = ends[gaps] - begins[gaps]
            assert sizes.max() < ENTRY_ALIGNMENT, "a gap that no layout has"
            self._zeros.append(rows)


def _await_all(pending: Sequence[Pending]) -> None:
    """Wait for all copies, and raise the first error only then."""
    errors: list[Exception] = []
    for copies in pending:
        try:
            copies.wait()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _tensor(source: Source) -> torch.Tensor:
    assert isinstance(source, DeviceSource)
    return source.tensor
