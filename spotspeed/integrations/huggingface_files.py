"""The directories `checkpoint-N` in which Trainer looks for what it resumes from, made anew.

    checkpoint-N/global_stepN/spotspeed.json, latest    where the engine's state is
    checkpoint-N/rng_state_RANK.pth, scheduler.pt       as Trainer writes them
    checkpoint-N/trainer_state.json                     written last: with it Trainer can resume

Weights in Hugging Face's own form are not among them: `spotspeed export` makes those.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from spotspeed.checkpoint.catalog import scan
from spotspeed.checkpoint.commit import roll_forward
from spotspeed.checkpoint.marker import mark, read_marker
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.save import rank_key
from spotspeed.checkpoint.session import DRAIN_TIMEOUT_S, absolute
from spotspeed.coordinator.word import word_of_rank_zero
from spotspeed.core import plain
from spotspeed.core.manifest import MAX_STEP
from spotspeed.errors import CorruptionError, FormatError, StorageError
from spotspeed.staging.client import find_saver
from spotspeed.state.late import LATE
from spotspeed.state.plain_tensors import from_plain
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage

NAME = "huggingface"
"""Of Trainer's late state."""
STATE_FILE = "trainer_state.json"
_DIRECTORY = re.compile(r"checkpoint-(\d+)")
_logger = logging.getLogger("spotspeed")
_prepared: set[tuple[str, str]] = set()


def prepare(output_dir: str, path: str) -> None:
    """Let the newest resumable checkpoint at `path` have its `output_dir/checkpoint-N`.

    Every rank calls it, before anybody looks there; only the first call for the two counts. A
    newest directory that Trainer could not resume from is renamed. Waits for a saver that an
    earlier launch left on this node.
    """
    folder, storage = Path(output_dir).absolute(), open_storage(absolute(path))
    if (str(folder), storage.url) in _prepared:
        return
    _prepared.add((str(folder), storage.url))

    def decide() -> bytes:
        chosen = _choose(storage, folder)
        if chosen is not None:
            _make(chosen, storage, folder)
        _set_aside(folder)
        place = None if chosen is None else [chosen.manifest.ticket.directory,
                                             chosen.manifest.digest]  # fmt: skip
        return json.dumps(place).encode()

    place = json.loads(word_of_rank_zero(NAME, decide, timeout_s=2 * DRAIN_TIMEOUT_S))
    if place is not None:
        # Where ranks do not share their directories, each makes its own.
        _make(CheckpointReader.open(storage, place[0], digest=place[1]), storage, folder)


def _choose(storage: Storage, folder: Path) -> CheckpointReader | None:
    """The newest checkpoint that has Trainer's state and is newer than every whole directory."""
    _await_saver(storage)
    roll_forward(storage)
    whole = max((step for step, path in _directories(folder) if _is_whole(path)), default=-1)
    for info in scan(storage).sealed:
        if info.step <= whole:
            break
        try:
            reader = CheckpointReader.open(storage, info.directory, digest=info.digest)
            if _loop_state(reader):
                return reader
            _logger.warning("%s has no state of Trainer's: passed over", info.directory)
        except CorruptionError as error:
            _logger.warning("%s is passed over: %s", info.directory, error)
    return None


def _await_saver(storage: Storage) -> None:
    """What an earlier launch has staged on this node is to be sealed first."""
    try:
        saver = find_saver(storage.url)
        if saver is not None:
            with contextlib.closing(saver):
                saver.drain(MAX_STEP, timeout_s=DRAIN_TIMEOUT_S)
    except StorageError as error:
        _logger.warning("%s: %s", storage.url, error)


def _make(reader: CheckpointReader, storage: Storage, folder: Path) -> None:
    """Write the files of one checkpoint, unless they are there."""
    ticket, state = reader.manifest.ticket, _loop_state(reader)
    target = folder / f"checkpoint-{ticket.step}"
    if _is_whole(target):
        return
    target.mkdir(parents=True, exist_ok=True)
    tag = f"global_step{ticket.step}"
    if read_marker(open_storage(target), tag) is None:
        mark(storage, reader.manifest, str(target), tag, is_latest=True)
    for rank in range(ticket.world_size):
        name = "rng_state.pth" if ticket.world_size == 1 else f"rng_state_{rank}.pth"
        _save(target / name, _generators(_rank_state(reader, rank)["rng"]))
    if state["schedule"] is not None:
        schedule = plain.decode(state["schedule"], source=f"{ticket.directory}: scheduler")
        _save(target / "scheduler.pt", from_plain(schedule))
    _write(target / STATE_FILE, lambda path: path.write_text(state["state"], encoding="utf-8"))
    _logger.info("%s stands for %s", target, ticket.directory)


def _loop_state(reader: CheckpointReader) -> dict[str, Any]:
    """Trainer's late state; {} when the checkpoint was stored without."""
    late = _rank_state(reader, 0).get(LATE) or {}
    if NAME not in late:
        return {}
    source = f"{reader.manifest.ticket.directory}: {NAME}"
    found = plain.decode(late[NAME], source=source)
    if found and (not isinstance(found, dict) or found.get("step") != reader.manifest.ticket.step):
        raise FormatError(f"{source}: is not of its step")
    return found or {}


def _rank_state(reader: CheckpointReader, rank: int) -> dict[str, Any]:
    source = f"{reader.manifest.ticket.directory}: rank {rank}"
    state: dict[str, Any] = from_plain(plain.decode(reader.blob(rank_key(rank)), source=source))
    return state


def _generators(rng: Mapping[str, Any]) -> dict[str, Any]:
    """The generators of one rank, in Trainer's form."""
    numpy = rng["numpy"]
    found = {
        "python": rng["python"],
        "numpy": (numpy["bit_generator"], numpy["state"]["key"], int(numpy["state"]["pos"]),
                  int(numpy["has_gauss"]), float(numpy["gauss"])),
        "cpu": rng["torch"],
    }  # fmt: skip
    if rng["device"] is not None:
        # A process trains on one device; those beside it have no state that anybody draws from.
        name, state = rng["device"]
        found[name] = [state] * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return found


def _set_aside(folder: Path) -> None:
    """Rename what Trainer would choose as its newest and could not resume from."""
    for _, path in reversed(_directories(folder)):
        if _is_whole(path):
            return
        aside = path.with_name(f"{path.name}.unfinished-{time.time_ns()}")
        path.rename(aside)
        _logger.warning("%s has no %s, so nothing can resume from it: it is now %s", path,
                        STATE_FILE, aside.name)  # fmt: skip


def _directories(folder: Path) -> list[tuple[int, Path]]:
    """Trainer's checkpoints by step, ascending."""
    if not folder.is_dir():
        return []
    found = ((_DIRECTORY.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match is not None)


def _is_whole(path: Path) -> bool:
    return (path / STATE_FILE).is_file()


def _save(path: Path, value: Any) -> None:
    _write(path, lambda temporary: torch.save(value, temporary))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """The file as a whole, whoever else writes the same one at this moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)
