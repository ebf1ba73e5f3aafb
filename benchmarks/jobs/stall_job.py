"""The training that stall.py measures: ZeRO-2 in bf16, each way to save in turn, on every rank.

A step is a real DeepSpeed step, padded to `--step-s` in its forward by sleeping (an accelerator
works, the host is idle) or by multiplying matrices (the host works). Rank 0 writes the figures.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import spotspeed

BATCH_BYTES = 4 << 20


class Model(nn.Module):
    """Square layers; `pad` is called in the middle of the forward."""

    def __init__(self, width: int, layers: int, pad: Callable[[], None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.pad = pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        self.pad()
        return x.float().pow(2).mean()


class Padding:
    """Makes a step last `step_s`: by what it lacks since `begin`, asleep or at work."""

    def __init__(self, step_s: float, is_busy: bool) -> None:
        self.step_s, self.is_busy, self.other_s, self.began = step_s, is_busy, 0.0, 0.0
        self.matrix = torch.randn(192, 192)

    def __call__(self) -> None:
        until = self.began + max(0.0, self.step_s - self.other_s)
        if not self.is_busy:
            time.sleep(max(0.0, until - time.perf_counter()))
        while self.is_busy and time.perf_counter() < until:
            self.matrix @ self.matrix


class Job:
    """One rank: the engine, its checkpointer, and the time spent in the checkpointer's hooks."""

    def __init__(self, options: argparse.Namespace) -> None:
        deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
        self.rank = distributed.get_rank()
        self.folder = Path(options.folder)
        self.pad = Padding(options.step_s, options.busy)
        torch.manual_seed(1)
        model = Model(options.width, options.layers, self.pad)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config(self.folder)
        )
        self.x = torch.randn(1, options.width).bfloat16()
        self.checkpointer = spotspeed.attach(self.engine)
        self.due: set[int] = set()
        self.checkpointer.is_on_grid = self.due.__contains__
        self.hook_s, self.written, self.submitted = 0.0, 0, []
        submit = self.checkpointer.submit
        self.checkpointer.submit = lambda *words: self._remember(submit(*words))
        for name in ("before_update", "after_update"):
            setattr(self.checkpointer, name, self._timed(getattr(self.checkpointer, name)))
        self.pad.step_s = 0.0
        times = [self.step() for _ in range(5)]
        self.pad.step_s, self.pad.other_s = options.step_s, sorted(times)[2]
        self.tensors = self._tensors()
        self.size_bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def step(self) -> float:
        """One optimizer update; the seconds that it took."""
        self.pad.began = began = time.perf_counter()
        self.engine.backward(self.engine(self.x))
        self.engine.step()
        return time.perf_counter() - began

    def together(self) -> None:
        distributed.barrier()

    # The contenders: each saves once and returns (held_s, durable_s, steps beside it).

    def spotspeed(self) -> tuple[float, float, list[float]]:
        """A periodic save; held is what the hooks take beyond their time in other steps."""
        self.hook_s = 0.0
        idle_steps = [self.step() for _ in range(2)]
        idle_s = self.hook_s / len(idle_steps)
        self.together()
        self.due.add(int(self.engine.global_steps) + 1)
        self.hook_s = 0.0
        self.step()
        began, steps = time.perf_counter(), []
        handle = self.submitted.pop()
        sealed: list[float] = []
        handle.upload_completion.add_done_callback(lambda _: sealed.append(time.perf_counter()))
        while not self.everywhere(handle.upload_completion.done()):
            steps.append(self.step())
        if not steps:
            steps.append(self.step())
        held_s = max(0.0, self.hook_s - (1 + len(steps)) * idle_s)
        handle.wait(60)
        return held_s, sealed[0] - began, steps

    def spotspeed_async(self) -> tuple[float, float, list[float]]:
        """`spotspeed.async_save`; held is the call, and what the hooks take until it is durable."""
        self.hook_s = 0.0
        idle_steps = [self.step() for _ in range(2)]
        idle_s = self.hook_s / len(idle_steps)
        self.together()
        self.hook_s, began, sealed = 0.0, time.perf_counter(), list[float]()
        handle = spotspeed.async_save(self.engine, tag=f"async-{self.written}")
        call_s = time.perf_counter() - began
        handle.upload_completion.add_done_callback(lambda _: sealed.append(time.perf_counter()))
        steps = [self.step()]
        while not self.everywhere(handle.upload_completion.done()):
            steps.append(self.step())
        handle.wait(60)
        held_s = call_s + max(0.0, self.hook_s - len(steps) * idle_s)
        return held_s, sealed[0] - began, steps

    def spotspeed_checkpoint(self) -> tuple[float, float, list[float]]:
        """`engine.save_checkpoint` of an attached engine: durable, with its marker."""
        began = time.perf_counter()
        self.engine.save_checkpoint(str(self.folder / "marked"), tag=f"r{self.written}")
        took = time.perf_counter() - began
        return took, took, []

    def spotspeed_waiting(self) -> tuple[float, float, list[float]]:
        """An explicit save, waited for: as a notice would, without the agreement."""
        began = time.perf_counter()
        handle = self.checkpointer.save(f"wait-{self.engine.global_steps}-{self.written}")
        handle.wait(60)
        took = time.perf_counter() - began
        return took, took, []

    def deepspeed(self) -> tuple[float, float, list[float]]:
        began = time.perf_counter()
        original = type(self.engine).save_checkpoint.__wrapped__
        original(self.engine, str(self.folder / "deepspeed"), tag=f"r{self.written}")
        took = time.perf_counter() - began
        return took, took, []

    def dcp(
        self, kind: AsyncCheckpointerType, stager: DefaultStager | None = None
    ) -> tuple[float, float, list[float]]:
        """`stager`: one that keeps its buffers, in shared memory, from save to save."""
        state = {f"{name}@{self.rank}": tensor for name, tensor in self.tensors.items()}
        place = self.folder / "dcp" / f"r{self.written}"
        began = time.perf_counter()
        answer = dcp.async_save(
            state, checkpoint_id=place, process_group=self.group, async_checkpointer_type=kind,
            async_stager=stager,
        )  # fmt: skip
        held_s = time.perf_counter() - began
        future = getattr(answer, "upload_completion", answer)
        steps = []
        while not self.everywhere(future.done()):
            steps.append(self.step())
        future.result()
        return held_s, time.perf_counter() - began, steps

    @cached_property
    def warm(self) -> dict[str, torch.Tensor]:
        """Memory for a copy of the state; its pages are there."""
        return {name: torch.zeros_like(tensor).fill_(1) for name, tensor in self.tensors.items()}

    @cached_property
    def stager(self) -> DefaultStager:
        """Keeps its buffers, in shared memory, from save to save."""
        # Pinning needs a CUDA device; shared buffers that are faulted in are the rest of that mode.
        return DefaultStager(StagingOptions(
            use_pinned_memory=torch.cuda.is_available(),
            use_non_blocking_copy=torch.cuda.is_available(),
            use_shared_memory=True, use_async_staging=False,
        ))  # fmt: skip

    def memcpy(self) -> tuple[float, float, list[float]]:
        warm = self.warm
        began = time.perf_counter()
        for name, tensor in self.tensors.items():
            warm[name].copy_(tensor)
        took = time.perf_counter() - began
        return took, took, []

    def raw_write(self) -> tuple[float, float, list[float]]:
        """The same number of bytes, in 4 MiB writes past the page cache, and fsync."""
        buffer = mmap.mmap(-1, BATCH_BYTES)
        buffer.write(os.urandom(BATCH_BYTES))
        path = self.folder / f"raw-{self.rank}"
        began = time.perf_counter()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        for _ in range(-(-self.size_bytes // BATCH_BYTES)):
            os.write(file, buffer)
        os.fsync(file)
        took = time.perf_counter() - began
        os.close(file)
        path.unlink()
        return took, took, []

    def nothing(self) -> tuple[float, float, list[float]]:
        return 0.0, 0.0, [self.step() for _ in range(2)]

    def contenders(self) -> dict[str, Callable[[], tuple[float, float, list[float]]]]:
        self.group = distributed.new_group(backend="gloo")
        kinds = AsyncCheckpointerType
        return {
            "no save": self.nothing,
            "spotspeed, periodic": self.spotspeed,
            "spotspeed, async_save": self.spotspeed_async,
            "spotspeed, save and wait": self.spotspeed_waiting,
            "spotspeed, save_checkpoint": self.spotspeed_checkpoint,
            "DeepSpeed save_checkpoint": self.deepspeed,
            "DCP async_save, thread": lambda: self.dcp(kinds.THREAD),
            "DCP async_save, process": lambda: self.dcp(kinds.PROCESS),
            "DCP async_save, cached": lambda: self.dcp(kinds.THREAD, self.stager),
            "plain memcpy": self.memcpy,
            "raw O_DIRECT write + fsync": self.raw_write,
        }

    def run(self, rounds: int, only: str) -> dict[str, list[dict[str, Any]]]:
        """Each contender whose name starts with one of the words of `only`, once a round."""
        found: dict[str, list[dict[str, Any]]] = {}
        contenders = self.contenders()
        names = [name for name in contenders if name.startswith(tuple(only.split(";")))]
        for number in range(rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                self.step()
                self.written += 1
                self.together()
                if self.rank == 0:
                    (self.folder / "now").write_text(f"{number} {name}")
                held_s, durable_s, steps = contenders[name]()
                mine = {"held_s": held_s, "durable_s": durable_s, "steps_s": steps}
                answers: list[Any] = [None] * distributed.get_world_size()
                distributed.all_gather_object(answers, mine)
                self.clean()
                if number:  # the first round warms everything up
                    found.setdefault(name, []).append({
                        "held_s": max(one["held_s"] for one in answers),
                        "durable_s": max(one["durable_s"] for one in answers),
                        "steps_s": answers[0]["steps_s"],
                    })  # fmt: skip
        return found

    def everywhere(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank: the steps that follow have collectives."""
        value = torch.tensor([int(flag)])
        distributed.all_reduce(value, distributed.ReduceOp.MIN)
        return bool(value.item())

    def clean(self) -> None:
        self.together()
        if self.rank == 0:
            for name in ("deepspeed", "dcp"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.together()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """This rank's part of the state as flat fp32 tensors, as ZeRO-2 keeps it."""
        optimizer = self.engine.optimizer
        found = {}
        for number, master in enumerate(optimizer.single_partition_of_fp32_groups):
            found[f"master.{number}"] = master.detach()
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}.{number}"] = optimizer.optimizer.state[master][kind]
        return found

    def _remember(self, handle: Any) -> Any:
        self.submitted.append(handle)
        return handle

    def _timed(self, hook: Callable[[Any], None]) -> Callable[[Any], None]:
        def timed(engine: Any) -> None:
            began = time.perf_counter()
            hook(engine)
            self.hook_s += time.perf_counter() - began

        return timed


def config(folder: Path) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "spotspeed": {"path": str(folder / "spotspeed"), "interval": {"seconds": None},
                      "keep": {"last": 1}},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--step-s", type=float, required=True)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    job = Job(options)
    found = job.run(options.rounds, options.only)
    if job.rank == 0:
        Path(options.out).write_text(json.dumps({
            "bytes": job.size_bytes * distributed.get_world_size(),
            "parameters": 2 * options.layers, "step_s": job.pad.step_s,
            "bare_step_s": job.pad.other_s, "rounds": found,
        }))  # fmt: skip
    job.checkpointer.close()


if __name__ == "__main__":
    main()
