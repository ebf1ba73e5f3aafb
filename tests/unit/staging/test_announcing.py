"""Fragments are described to the saver once, and again only when they are others."""

from __future__ import annotations

from spotspeed.core.chunks import join, pack_parts
from spotspeed.core.described import Described, lay_out
from spotspeed.core.interval import Interval
from spotspeed.core.layout import Fragment, TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.core.saver_fields import NewObject
from spotspeed.core.saver_protocol import Begin, Describe, Message
from spotspeed.staging.announcing import Announcer
from spotspeed.staging.copy_plan import Geometry

CHUNK = 4096
TICKET = Ticket(1, 3, "a", "step-3", "periodic", 1, 0)


def fragment(kind: str, name: str, count: int) -> Fragment:
    return Fragment(TensorKey(kind, name), "float32", (count,), Interval(0, count))


def begin(number: int, *fragments: Fragment, objects: tuple[NewObject, ...] = ()) -> Begin:
    return Begin(number, TICKET, 0, 0, 0, 0, "", fragments, objects)


def laid_out(sent: list[Message]) -> list[int]:
    """The raw bytes that the other side finds, which are those that were announced."""
    described: dict[int, Described] = {0: Described.of((), chunk_bytes=CHUNK)}
    found = []
    for message in sent:
        if isinstance(message, Describe):
            described = {0: described[0], message.number: Described.of(
                message.fragments, chunk_bytes=message.chunk_bytes)}  # fmt: skip
        elif isinstance(message, Begin):
            counts = [item.fragment_count for item in message.objects]
            parts = lay_out(described[message.described], message.fragments, counts)
            assert join(parts, counts).raw_bytes == message.raw_bytes
            found.append(message.raw_bytes)
    return found


def test_only_what_is_new_is_sent() -> None:
    sent: list[Message] = []
    announcer = Announcer(sent.append, CHUNK)
    state = [fragment("fp32", f"w{n}", 100 + n) for n in range(50)]
    for number, size in enumerate((7, 9)):
        found = announcer.announce(begin(number, *state, fragment("blob", "rank", size)))
        whole = Geometry.of(found.layout)
        assert (whole.raw_offsets == found.geometry.raw_offsets).all()
        assert (whole.sizes == found.geometry.sizes).all()
        assert (whole.sources == found.geometry.sources).all()
    assert [type(message) for message in sent] == [Describe, Begin, Begin]
    other = fragment("fp32", "w0", 9)
    announcer.announce(begin(2, other, *state[1:]))
    assert [type(message) for message in sent[3:]] == [Describe, Begin]
    assert len(laid_out(sent)) == 3


def test_new_frozen_objects_come_before_what_is_described() -> None:
    sent: list[Message] = []
    announcer = Announcer(sent.append, CHUNK)
    frozen, state = fragment("weight", "v", 2000), fragment("fp32", "w", 10)
    blob = fragment("blob", "rank", 3)
    announcer.announce(begin(1, state, blob))
    objects = (NewObject("0" * 64, 1),)
    found = announcer.announce(begin(2, frozen, state, blob, objects=objects))
    assert [type(message) for message in sent] == [Describe, Begin, Begin]
    assert found.layout == join(pack_parts([frozen, state, blob], [1], chunk_bytes=CHUNK), [1])
    laid_out(sent)


def test_a_save_without_state_needs_no_description() -> None:
    sent: list[Message] = []
    Announcer(sent.append, CHUNK).announce(begin(1, fragment("blob", "rank", 3)))
    (message,) = sent
    assert isinstance(message, Begin)
    assert message.described == 0
    assert laid_out(sent) == [16]
