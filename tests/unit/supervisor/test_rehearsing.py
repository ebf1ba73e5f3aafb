"""The losses of a rehearsed engine, whichever way its script goes backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spotspeed.rehearsing import watch_backward
from spotspeed.supervisor.certify import read_log


class Engine:
    """As DeepSpeed's: scales the loss, and calls its backward."""

    def backward(self, loss: torch.Tensor) -> None:
        (loss / 2).backward()


class Pipe(Engine):
    """As DeepSpeed's: its own method is closed, and its base's is what it calls."""

    def backward(self, *_: Any) -> None:
        raise RuntimeError("only train_batch()")

    def train_batch(self, loss: torch.Tensor) -> None:
        super().backward(loss)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Room for losses; what is patched in torch and in the classes is put back."""
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)
    monkeypatch.setattr(Engine, "backward", Engine.backward)
    return []


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True) * 1.0


def watched(engine: Engine, noted: list[float]) -> Any:
    watch_backward(engine, lambda loss: noted.append(loss.item()))
    return engine


def test_a_loss_is_noted_once_and_as_the_script_gave_it(noted: list[float]) -> None:
    engine = watched(Engine(), noted)
    engine.backward(loss(3.0))
    assert noted == [3.0]
    loss(5.0).backward()
    torch.autograd.backward([loss(7.0), loss(9.0)])
    assert noted == [3.0, 5.0, 7.0, 9.0]


def test_a_pipelines_losses_are_noted_and_its_gradients_between_stages_are_not(
    noted: list[float],
) -> None:
    engine = watched(Pipe(), noted)
    engine.train_batch(loss(3.0))
    loss(4.0).backward(gradient=torch.tensor(1.0))
    torch.autograd.backward([loss(4.0)], [torch.tensor(1.0)])
    assert noted == [3.0]


def test_another_engines_losses_are_its_own(noted: list[float]) -> None:
    watched(Engine(), noted)
    Engine().backward(loss(3.0))
    assert noted == []


def test_ranks_without_losses_count_and_steps_are_those_of_all(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.losses").write_text("5\n6\n")
    (tmp_path / "rank-00001.losses").write_text("5 0 aa\n5 1 bb\n5\n6 0 cc\n6\n")
    log = read_log(tmp_path)
    assert (log.ranks, log.steps) == (2, (5, 6))
    assert log.losses == {(5, 0, 1): "aa", (5, 1, 1): "bb", (6, 0, 1): "cc"}
