"""One rank that meets the others as `mode` says, talks with all of them, and reports in JSON."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading

from spotspeed.config import CoordinatorConfig
from spotspeed.coordinator.bootstrap import bootstrap, connect_ranks
from spotspeed.coordinator.transport import PeerDown, Received, Transport


def main(mode: str) -> None:
    """Bootstrap twice in a row, exchange with every rank over each, leave in order."""
    said: list[str] = []
    catcher = logging.Handler()
    catcher.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("spotspeed").addHandler(catcher)
    logging.getLogger("spotspeed").setLevel(logging.INFO)
    join(mode)
    from torch import distributed

    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if mode == "absent" and rank == world_size - 1:
        distributed.barrier()
        return
    for _ in range(2):
        try:
            transport = connect(mode, rank, world_size)
        except Exception as error:
            report(rank=rank, error=f"{type(error).__name__}: {error}")
            break
        # The training's own collectives run meanwhile, on the main thread's communicator.
        heard: list[list[int]] = []
        control = threading.Thread(target=talk, args=(transport, heard))
        control.start()
        for _ in range(20):
            distributed.barrier()
        control.join()
        report(rank=rank, heard=heard[0], said=said[-1], is_mpi="mpi4py.MPI" in sys.modules)
    distributed.barrier()
    distributed.destroy_process_group()


def connect(mode: str, rank: int, world_size: int) -> Transport:
    if mode.startswith("messages"):
        settings = CoordinatorConfig(transport="mpi")
        return connect_ranks(settings, rank, world_size, timeout_s=60)
    return bootstrap(rank=rank, world_size=world_size, timeout_s=2 if mode == "absent" else 60)


def join(mode: str) -> None:
    """Initialise torch.distributed, in one of the ways in which jobs do it."""
    if mode in ("mpi", "reversed"):
        from mpi4py import MPI

        if mode == "reversed":
            os.environ["RANK"] = str(MPI.COMM_WORLD.size - 1 - MPI.COMM_WORLD.rank)
    if mode == "messages of one thread":
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI
    if mode == "messages reversed":
        os.environ["RANK"] = str(int(os.environ["WORLD_SIZE"]) - 1 - int(os.environ["RANK"]))
    if mode == "deepspeed":
        import deepspeed

        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            os.environ.pop(name, None)
        deepspeed.init_distributed("gloo", distributed_port=int(os.environ["MASTER_PORT"]))
        return
    from torch import distributed

    where = f"file://{os.environ['MEETING_FILE']}" if mode == "file" else "env://"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", where, rank=rank, world_size=world_size)


def talk(transport: Transport, result: list[list[int]]) -> None:
    """Send to every rank, note those heard from in the order of their numbers, and leave."""
    for rank in range(transport.world_size):
        transport.send(rank, b"from %d" % transport.rank)
    poller = select.poll()
    poller.register(transport.fileno(), select.POLLIN)
    heard: list[int] = []
    farewells = set()
    while len(farewells) < transport.world_size:
        poller.poll(transport.wait_s() * 1000)
        for event in transport.handle():
            assert isinstance(event, Received) or event.is_orderly, event
            if isinstance(event, PeerDown):
                farewells.add(event.rank)
            elif event.payload == b"done":
                farewells.add(event.sender)
            else:
                assert event.payload == b"from %d" % event.sender
                heard.append(event.sender)
                if len(heard) == transport.world_size:
                    for rank in range(transport.world_size):
                        transport.send(rank, b"done")
    transport.close(drain_s=10)
    result.append(sorted(heard))


def report(**facts: object) -> None:
    """One line, written at once: lines of several ranks do not mix."""
    os.write(1, f"\nREPORT {json.dumps(facts)}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1])
