"""Nobody waits for a saver that does not read, and nothing is lost or overtaken on the way."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator

import pytest

from spotspeed.staging.outbox import Outbox

LIMIT_S = 30.0
FRAMES = [bytes([number]) * size for number, size in enumerate((3, 4_000_000, 5, 700_000, 1))]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_frames_arrive_in_order_and_count_as_sent_only_when_the_kernel_has_them(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    sent: queue.SimpleQueue[int] = queue.SimpleQueue()
    outbox = Outbox(ours, lambda error: pytest.fail(str(error)))
    for number, frame in enumerate(FRAMES):
        outbox.send(frame, lambda number=number: sent.put(number))  # type: ignore[misc]
    assert sent.get(timeout=LIMIT_S) == 0 and sent.empty(), "the second fills the socket"
    assert not outbox.flush(0)
    expected = b"".join(FRAMES)
    received = bytearray()
    while len(received) < len(expected):
        received += theirs.recv(1 << 20)
    assert received == expected
    assert outbox.flush(LIMIT_S)
    assert [sent.get(timeout=LIMIT_S) for _ in FRAMES[1:]] == [1, 2, 3, 4]
    outbox.send(b"again", lambda: sent.put(5))
    assert sent.get(timeout=LIMIT_S) == 5 and theirs.recv(5) == b"again"


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "standing still"])
def test_a_side_that_takes_no_more_is_reported_once(
    ends: tuple[socket.socket, socket.socket], is_gone: bool
) -> None:
    ours, theirs = ends
    lost: queue.SimpleQueue[OSError] = queue.SimpleQueue()
    outbox = Outbox(ours, lost.put, stuck_s=LIMIT_S if is_gone else 0.02)
    outbox.send(FRAMES[1], lambda: pytest.fail("it was not sent"))
    if is_gone:
        theirs.close()
    error = lost.get(timeout=LIMIT_S)
    assert is_gone or "has taken no message for 0.02 s" in str(error)
    assert outbox.flush(LIMIT_S) and lost.empty(), "nobody waits for what cannot be sent"


def test_a_send_to_who_is_gone_raises(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.close()
    outbox = Outbox(ours, lambda error: pytest.fail(str(error)))
    with pytest.raises(OSError, match="pipe"):
        outbox.send(b"hello")


def test_many_threads_may_send(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    outbox = Outbox(ours, lambda error: pytest.fail(str(error)))
    threads = [threading.Thread(target=outbox.send, args=(bytes([number]) * 300_000,))
               for number in range(4)]  # fmt: skip
    for thread in threads:
        thread.start()
    received = bytearray()
    while len(received) < 4 * 300_000:
        received += theirs.recv(1 << 20)
    for thread in threads:
        thread.join(LIMIT_S)
    frames = [received[start : start + 300_000] for start in range(0, len(received), 300_000)]
    assert sorted(sorted(set(frame)) for frame in frames) == [[0], [1], [2], [3]]
