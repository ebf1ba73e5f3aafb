"""Saves of two ranks in rounds, each with a kill at one labelled point; what is left is checked.

`killing_rounds.py PATH POINT VICTIM ROUNDS`: points of the ranks are struck by rank 1, those of
the saver by the saver (killing/sitecustomize.py). VICTIM is 0, 1, "all" (ranks) or "saver".
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from spotspeed.checkpoint.catalog import list_sealed
from spotspeed.checkpoint.commit import roll_forward
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.errors import SpotSpeedError
from spotspeed.staging.client import find_saver
from spotspeed.staging.copy_plan import CopyPlan
from spotspeed.storage.local import LocalStorage
from tests.distributed.drivers.saver_rank import Rank, pieces_of
from tests.distributed.saver_ranks import wait_gone

COUNT, ELEMENTS = 6, 1_000_000
POOL_GB = 0.012
"""Smaller than a save, so that staging, writing and waiting for slots go on together."""
HANG_S = 300.0
"""After so long something hangs; a machine that does much else takes a minute to start a saver."""
KILLING = str(Path(__file__).with_name("killing"))


def await_files(*files: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} never came"
        time.sleep(0.002)


def be_rank(path: Path, rank: int, step: int, place: Path, point: str) -> None:
    """Stage and store one save; ends early when this is the victim."""
    os.environ.update(KILL_POINT=point, KILL_VICTIMS=str(place / "victims"))
    os.environ["PYTHONPATH"] = KILLING + os.pathsep + os.environ.get("PYTHONPATH", "")
    actor = Rank(str(path), rank, 2, POOL_GB)
    saver = actor.reserve(COUNT * ELEMENTS * 4)["saver_pid"]
    (place / f"{rank}.new").write_text(f"{os.getpid()} {saver}")
    (place / f"{rank}.new").rename(place / f"{rank}.ready")
    await_files(place / "victims")

    def strike() -> None:
        if rank == 1:
            for word in (place / "victims").read_text().split():
                os.kill(saver if word == "saver" else int(word), signal.SIGKILL)

    copies = iter(range(1 << 30))
    original = CopyPlan.run

    def run(plan: CopyPlan, *args: object) -> None:
        if next(copies) == 2 and point == "mid-staging":
            strike()
        original(plan, *args)  # type: ignore[arg-type]

    CopyPlan.run = run  # type: ignore[method-assign, assignment]
    if point == "before staging":
        strike()
    try:
        actor.stage(step, COUNT, ELEMENTS)
        actor.wait_staged(step)
        (place / f"{rank}.staged").touch()
        await_files(*(() if point != "staged" else (place / "0.staged", place / "1.staged")))
        if point == "staged":
            strike()
        actor.stored(step)
        actor.close()
    except SpotSpeedError as error:
        (place / f"{rank}.error").write_text(str(error))


def play(path: Path, step: int, place: Path, point: str, victim: str) -> None:
    """One round: two ranks, one kill, and no process left of them."""
    place.mkdir()
    ranks = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                be_rank(path, rank, step, place, point)
            except Exception:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(0)
        ranks.append(child)
    await_files(place / "0.ready", place / "1.ready")
    saver = int((place / "0.ready").read_text().split()[1])
    words = {"0": ranks[:1], "1": ranks[1:], "all": ranks, "saver": ["saver"], "nobody": []}[victim]
    (place / "new").write_text(" ".join(map(str, words)))
    (place / "new").rename(place / "victims")
    for rank in ranks:
        wait_gone(rank, HANG_S)
    for rank in ranks:
        os.waitpid(rank, 0)
    wait_gone(saver, HANG_S)


def await_no_saver(path: Path) -> None:
    """Return when nobody serves `path`: a saver that died is followed by another."""
    while (session := find_saver(str(path))) is not None:
        with contextlib.closing(session):
            saver = session.saver_pid
        wait_gone(saver, HANG_S)


def check(path: Path, step: int, place: Path, victim: str, before: set[int]) -> None:
    """Every promise up to this round is kept; the file `sealed` lists the steps that are sealed."""
    storage = LocalStorage(path)
    roll_forward(storage)
    sealed = {info.step: info for info in list_sealed(storage)}
    assert before <= set(sealed), f"sealed and gone: {before - set(sealed)}"
    for info in list_sealed(storage)[:1]:
        reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
        assert reader.verify().is_whole
        for fragment, data in expected(info.step):
            found = bytearray(len(data))
            reader.read_into([(fragment, found)])
            assert bytes(found) == data, f"{fragment.key} is not of step {info.step}"
    if victim != "saver" and all((place / f"{rank}.staged").exists() for rank in (0, 1)):
        assert step in sealed, f"step {step} was staged on every rank, and is lost"
    (place / "sealed").write_text(" ".join(map(str, sealed)))


def expected(step: int) -> Iterator[tuple[object, bytes]]:
    for rank in (0, 1):
        for fragment, tensor in pieces_of(step, rank, COUNT, ELEMENTS):
            yield fragment, tensor.numpy().tobytes()


def main(path: Path, point: str, victim: str, rounds: int) -> None:
    sealed: set[int] = set()
    for step in range(rounds + 1):
        place, whom = path.with_name(f"round-{step}"), victim if step else "nobody"
        play(path, step, place, point, whom)
        # In processes of their own: this one must stay fit to be forked, that is without threads.
        in_child(await_no_saver, path)
        in_child(check, path, step, place, whom, sealed)
        sealed = {int(word) for word in (place / "sealed").read_text().split()}
        assert step or sealed == {0}, "nothing disturbed the first save"
    print(f"{rounds} rounds, {len(sealed)} sealed", flush=True)


def in_child(work: Callable[..., None], *arguments: object) -> None:
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
