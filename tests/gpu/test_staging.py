"""State in GPU memory reaches the saver unchanged, while later kernels already run."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from spotspeed.checkpoint.reader import CheckpointReader  # noqa: E402
from spotspeed.config import parse_block  # noqa: E402
from spotspeed.core.interval import Interval  # noqa: E402
from spotspeed.core.layout import Fragment, TensorKey  # noqa: E402
from spotspeed.core.manifest import Ticket  # noqa: E402
from spotspeed.staging.devices import ENGINES, NativeQueue  # noqa: E402
from spotspeed.staging.native import cuda_available  # noqa: E402
from spotspeed.staging.stager import Stager, Terms  # noqa: E402
from spotspeed.state.moment import behind  # noqa: E402
from spotspeed.storage.local import LocalStorage  # noqa: E402

native = pytest.mark.skipif(not cuda_available(), reason="this build has no CUDA kernels")
SPIN = 2_000_000_000
"""Clock cycles of a kernel that is still running when a save of a few MB has ended."""


def pieces_of(*tensors: torch.Tensor) -> list[tuple[Fragment, torch.Tensor]]:
    return [
        (Fragment(TensorKey("fp32", f"w{n}"), "float32", (len(tensor),),
                  Interval(0, len(tensor))), tensor)
        for n, tensor in enumerate(tensors)
    ]  # fmt: skip


def read(path: Path, save: object, pieces: list[tuple[Fragment, torch.Tensor]]) -> list:
    manifest = save.upload_completion.result(60)
    found = [(fragment, bytearray(fragment.size_bytes)) for fragment, _ in pieces]
    CheckpointReader(LocalStorage(path), manifest).read_into(found)
    return [torch.frombuffer(data, dtype=torch.float32) for _, data in found]


@pytest.fixture
def stager(tmp_path: Path):
    made = Stager(str(tmp_path), parse_block({"path": str(tmp_path)}), 0)
    made.reserve(64 << 20, torch.device("cuda", torch.cuda.current_device()))
    yield made
    made.close()


TICKET = Ticket(1, 1, "a", "t", "periodic", 1, 0)


def test_gpu_tensors_are_saved_as_they_were_when_staging_began(tmp_path: Path, stager) -> None:
    state = torch.zeros(1 << 22, device="cuda")
    for _ in range(50):
        state.add_(1.0)  # still queued when stage() is called
    pieces = pieces_of(state)
    save = stager.stage(TICKET, pieces, {})
    assert save.wait_staged(60)
    state.add_(1.0)
    assert read(tmp_path, save, pieces)[0].eq(50.0).all()


@native
def test_the_arena_is_locked_although_it_was_reserved_before_the_first_save(stager) -> None:
    assert isinstance(ENGINES.queue(torch.device("cuda", 0), None), NativeQueue)
    arena = stager._session.arena
    buffer = torch.frombuffer(arena._arena, dtype=torch.uint8)
    assert buffer.is_pinned()


@native
def test_copies_wait_for_the_boundary_and_not_for_what_came_after(tmp_path: Path, stager) -> None:
    training = torch.cuda.Stream()
    state = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(training):
        torch.cuda._sleep(SPIN // 20)
        state.fill_(7.0)  # the update
        boundary = torch.cuda.Event()
        boundary.record()
        torch.cuda._sleep(SPIN)  # the next forward and backward
        after = torch.cuda.Event()
        after.record()
    pieces = pieces_of(state)
    with behind(boundary):
        save = stager.stage(TICKET, pieces, {}, terms=Terms(after=boundary))
        assert save.wait_staged(60)
    assert not after.query(), "the copies queued behind the training"
    assert read(tmp_path, save, pieces)[0].eq(7.0).all()


@native
def test_thousands_of_small_tensors_arrive(tmp_path: Path, stager) -> None:
    flat = torch.randn(5_000 * 64, device="cuda")
    tensors = [flat.narrow(0, n * 64, 1 + n % 64) for n in range(5_000)]
    pieces = pieces_of(*tensors, torch.randn(3_000_001, device="cuda"))
    save = stager.stage(TICKET, pieces, {})
    assert save.wait_staged(60)
    for (_, tensor), data in zip(pieces, read(tmp_path, save, pieces), strict=True):
        assert torch.equal(tensor.cpu(), data)
