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
from spotspeed.staging.stager import Stager  # noqa: E402
from spotspeed.storage.local import LocalStorage  # noqa: E402


def test_gpu_tensors_are_saved_as_they_were_when_staging_began(tmp_path: Path) -> None:
    count = 1 << 22
    state = torch.zeros(count, device="cuda")
    for _ in range(50):
        state.add_(1.0)  # still queued when stage() is called
    fragment = Fragment(TensorKey("fp32", "w"), "float32", (count,), Interval(0, count))
    stager = Stager(str(tmp_path), parse_block({"path": str(tmp_path)}), 0)
    save = stager.stage(Ticket(1, 1, "a", "t", "periodic", 1, 0), [(fragment, state)], {})
    assert save.wait_staged(60)
    state.add_(1.0)
    manifest = save.upload_completion.result(60)
    stager.close()
    reader = CheckpointReader(LocalStorage(tmp_path), manifest)
    data = bytearray(fragment.size_bytes)
    reader.read_into([(fragment, data)])
    assert torch.frombuffer(data, dtype=torch.float32).eq(50.0).all()
