"""A resumed DeepSpeedCPUAdam goes on bit for bit, where its operator is built."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spotspeed.state.powers import count_through

ROOT = Path(__file__).resolve().parents[3]
BETAS = (0.9, 0.999)


def is_built() -> bool:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".torch_extensions"))
    return (root / "cpu_adam" / "cpu_adam.so").exists()


class DeepSpeedCPUAdam:
    """The steps that the operator is told; what the real one makes of them is tested below."""

    def __init__(self, *steps, betas=(BETAS,), opt_id=3):
        self.opt_id, self.ds_opt_adam, self.told = opt_id, self, []
        self.param_groups = [{"betas": pair} for pair in betas]
        self.state = {number: {"step": step} for number, step in enumerate(steps)}

    def adam_update(self, opt_id, step, *rest):
        assert opt_id == self.opt_id and rest[1:3] == BETAS
        self.told.append(step)


def test_the_steps_up_to_the_restored_one_are_counted_through():
    optimizer = DeepSpeedCPUAdam(4, 4)
    count_through(optimizer)
    assert optimizer.told == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "optimizer",
    [DeepSpeedCPUAdam(), DeepSpeedCPUAdam(3, 4), DeepSpeedCPUAdam(4, betas=(BETAS, (0.8, 0.99))),
     DeepSpeedCPUAdam(10**9), SimpleNamespace(state={0: {"step": 3}})],
    ids=["never stepped", "two counts", "two betas", "powers that are gone", "another optimizer"],
)  # fmt: skip
def test_nothing_is_counted_where_no_power_is_kept(optimizer):
    count_through(optimizer)
    assert getattr(optimizer, "told", []) == []


@pytest.mark.skipif(not is_built(), reason="DeepSpeed's cpu_adam is not built here")
def test_a_run_resumed_at_any_step_ends_in_the_same_bits():
    whole = run(1, 30)
    for step in range(1, 30):
        assert torch.equal(run(step + 1, 30, whole[step])[30][0], whole[30][0]), step


def run(begin, last, restored=None):
    """Master and moments after each of the steps [begin, last]."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam as Adam

    torch.manual_seed(0)
    master = torch.nn.Parameter(torch.randn(100))
    optimizer, kept = Adam([master], lr=1e-2), {}
    if restored is not None:
        master.data.copy_(restored[0])
        optimizer.state[master] = {
            "step": begin - 1, "exp_avg": restored[1].clone(), "exp_avg_sq": restored[2].clone(),
        }  # fmt: skip
        count_through(optimizer)
    for step in range(begin, last + 1):
        master.grad = torch.randn(100, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        state = optimizer.state[master]
        tensors = (master.detach(), state["exp_avg"], state["exp_avg_sq"])
        kept[step] = tuple(tensor.clone() for tensor in tensors)
    return kept
