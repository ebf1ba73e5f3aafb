"""The saver hears of the first chunks at once, and then in larger and larger batches."""

from __future__ import annotations

from spotspeed.core.chunks import StreamLayout, pack
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.saver_protocol import Chunks
from spotspeed.staging.flow import BATCH_BYTES, FIRST_BATCH_BYTES, ChunkFlow
from spotspeed.staging.pool import SlotPool

CHUNK_BYTES = 256 * 1024
COUNT = 4 * BATCH_BYTES // CHUNK_BYTES + 1


class Session:
    """Takes down what a flow says to the saver, which keeps every slot."""

    def __init__(self, slot_count: int) -> None:
        self.pool = SlotPool(slot_count)
        self.said: list[object] = []

    def send(self, message: object) -> None:
        self.said.append(message)


def layout_of(chunks: int) -> StreamLayout:
    elements = chunks * CHUNK_BYTES // 4
    fragment = Fragment(TensorKey("fp32", "w"), "float32", (elements,), Interval(0, elements))
    return pack([fragment], chunk_bytes=CHUNK_BYTES)


def test_batches_grow_from_one_that_the_disk_need_not_wait_for() -> None:
    session = Session(COUNT)
    flow = ChunkFlow(session, layout_of(COUNT), 1)  # type: ignore[arg-type]
    is_last = False
    while claimed := flow.claim(None):
        assert flow.fill(claimed) and not is_last
        is_last = flow.send(eager=False)
    assert is_last and flow.sent_bytes == COUNT * CHUNK_BYTES
    sizes = [len(message.slots) * CHUNK_BYTES for message in session.said
             if isinstance(message, Chunks)]  # fmt: skip
    assert sizes[0] == FIRST_BATCH_BYTES
    assert sizes[:4] == [FIRST_BATCH_BYTES << step for step in range(4)]
    assert max(sizes) == BATCH_BYTES and len(sizes) <= 8


def test_few_chunks_wait_for_more_unless_the_saver_is_waited_for() -> None:
    session = Session(COUNT)
    flow = ChunkFlow(session, layout_of(COUNT), 1)  # type: ignore[arg-type]
    first, second = flow.claim(None), flow.claim(None)
    few = {chunk: second.pop(chunk) for chunk in list(second)[:2]}
    for claimed in (first, few):
        flow.fill(claimed)
        flow.send(eager=False)
    assert len(session.said) == 1, "the first batch alone"
    flow.send(eager=True)
    assert session.said[1] == Chunks(1, len(first), tuple(few.values()))
