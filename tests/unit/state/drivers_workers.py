"""Reads through two real workers, and does to them what a launcher does; prints what became of it.

Run as `drivers_workers.py MODE START_METHOD`.
"""

from __future__ import annotations

import os
import signal
import sys

from torch.utils.data import DataLoader, Dataset

from spotspeed.core.sample_order import GlobalSampler
from spotspeed.state.loader import ordered_loader

alive_at_exit = []
"""Holds the iterator until the interpreter terminates and joins its workers itself."""


class Pids(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return os.getpid()


def make(method, *, persistent):
    loader = DataLoader(Pids(), 2, num_workers=2, persistent_workers=persistent,
                        multiprocessing_context=method)  # fmt: skip
    sampler = GlobalSampler(1000, global_batch=2, micro_batch=2, rank=0, world_size=1)
    return ordered_loader(loader, sampler)


def main(mode: str, method: str) -> None:
    loader = make(method, persistent=mode == "persistent")
    iterator = iter(loader)
    alive_at_exit.append(iterator)
    pids = {int(next(iterator)[0]) for _ in range(2)}
    assert len(pids) == 2 and os.getpid() not in pids
    if mode == "stranger":
        # Another process signals the workers, as a launcher does with a process group.
        names = " ".join(f"kill -{name} {pid};" for pid in pids for name in ("TERM", "USR1") * 5)
        assert os.system(names) == 0
    seen = {int(next(iterator)[0]) for _ in range(60)}
    assert seen == pids, (seen, pids)
    if mode == "parent":
        for worker in iterator._workers:
            worker.terminate()
            worker.join(10)
            assert worker.exitcode == 0, worker.exitcode
        os._exit(0)
    sys.stdout.write(f"{mode}: {len(pids)} workers lived\n")


if __name__ == "__main__":
    signal.alarm(60)
    main(*sys.argv[1:])
