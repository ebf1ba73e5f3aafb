"""Wrong settings, foreign and damaged checkpoints: one clear error on all ranks, nothing changed.

One launch of two ranks goes through all cases; `CASES` says what each finds and what it must get.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spotspeed.core.manifest import canonical_json
from tests.distributed.job import LIMIT_S
from tests.ranks import Finished, run_ranks

pytestmark = pytest.mark.ranks
RANKS = 2
WHOLE = "path unchanged"
CHECKPOINTS = "checkpoints unchanged"


def nothing(path: Path) -> None:
    """Leave the checkpoints of steps 5 and 10 as they are."""


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file of the user")


def newest(path: Path) -> Path:
    return max(path.glob("step-*"))


def torn(path: Path) -> None:
    """The newest save was cut short: one rank's receipt and the manifest are missing."""
    (newest(path) / "manifest.json").unlink()
    (newest(path) / "rank-00001.receipt").unlink()


def all_torn(path: Path) -> None:
    torn(path)
    (min(path.glob("step-*")) / "manifest.json").unlink()
    (min(path.glob("step-*")) / "rank-00000.receipt").unlink()


def unsealed(path: Path) -> None:
    """The newest save was cut short just before it was sealed."""
    (newest(path) / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    file = newest(path) / "manifest.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def alone(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """`damage`, where there is no older checkpoint."""

    def prepare(path: Path) -> None:
        shutil.rmtree(min(path.glob("step-*")))
        damage(path)

    return prepare


def newer_format(path: Path) -> None:
    """A manifest as a later major version would write it, with a seal that holds."""
    file = newest(path) / "manifest.json"
    body = canonical_json(json.loads(file.read_bytes())["body"] | {"major": 3})
    digest = hashlib.sha256(body).hexdigest().encode()
    file.write_bytes(b'{"body":' + body + b',"sha256":"' + digest + b'"}\n')


def bad_chunk_of_rank_1(path: Path) -> None:
    """One byte of the data that only rank 1 reads; frames begin after the header of 4096 bytes."""
    with (newest(path) / "rank-00001.shard").open("r+b") as file:
        file.seek(4096 + 100)
        byte = file.read(1)[0]
        file.seek(4096 + 100)
        file.write(bytes([byte ^ 1]))


@dataclass(frozen=True, slots=True)
class Case:
    """What is at the path, what the block says, and what every rank gets."""

    prepare: Callable[[Path], None] = nothing
    block: dict[str, Any] | None = None
    """Added to {"path": ...}; None for no block at all."""
    path: str | None = "{path}"
    error: str | None = None
    says: tuple[str, ...] = ()
    """Parts of the error's text, or of what was said about falling back."""
    step: int | None = None
    unchanged: str | None = None
    width: int = 64
    tag: str | None = None


def refused(error: str, *says: str, **more: Any) -> Case:
    return Case(**{"block": {}, "error": error, "says": says, "unchanged": WHOLE} | more)


CASES = {
    "no-block": refused("ConfigError", 'no "spotspeed" block', '{"path":', block=None),
    "no-path": refused("ConfigError", "path: required", path=None),
    "unknown-key": refused("ConfigError", 'intervall: unknown key; did you mean "interval"?',
                           block={"intervall": {"steps": 5}}),
    "wrong-type": refused("ConfigError", "keep.last", "found '3'", block={"keep": {"last": "3"}}),
    "path-is-a-file": refused("ConfigError", "is a file: give a directory", prepare=a_file),
    "path-unwritable": refused("ConfigError", "/proc/spotspeed cannot be written",
                               path="/proc/spotspeed"),
    "path-not-shared": refused("ConfigError", "must be shared by all ranks", "rank 1:",
                               path="{path}/node-{rank}", unchanged=CHECKPOINTS),
    "nothing-there": Case(empty, {}),
    "torn": Case(torn, {}, step=5),
    "all-torn": refused("CorruptionError", "manifest.json is gone: latest.json says",
                        prepare=all_torn, unchanged=CHECKPOINTS),
    "not-sealed-yet": Case(unsealed, {}, step=10),
    "cut-manifest": Case(cut_manifest, {}, step=5, says=("manifest.json", "cut short")),
    "cut-manifest-alone": refused("CorruptionError", "no checkpoint could be restored",
                                  "manifest.json: not a sealed manifest; cut short or damaged",
                                  prepare=alone(cut_manifest), unchanged=CHECKPOINTS),
    "newer-format": Case(newer_format, {}, step=5, says=("this version reads 1.x and 2.x",)),
    "newer-format-alone": refused("CorruptionError", "this version reads 1.x and 2.x",
                                  "install a spotspeed that knows it",
                                  prepare=alone(newer_format), unchanged=CHECKPOINTS),
    "bad-chunk": Case(bad_chunk_of_rank_1, {}, step=5,
                      says=("rank 1:", "rank-00001.shard", "digest")),
    "bad-chunk-alone": refused("CorruptionError", "rank 1:", "rank-00001.shard",
                               prepare=alone(bad_chunk_of_rank_1), unchanged=CHECKPOINTS),
    "unknown-tag": refused("ObjectNotFoundError", "'step-7'", "step-10, step-5", tag="step-7",
                           unchanged=CHECKPOINTS),
    "another-model": refused("InvalidLayoutError", "the checkpoint is of another model",
                             "token.weight: stored shape (256, 64), here (256, 96)", width=96,
                             unchanged=CHECKPOINTS),
}  # fmt: skip
FALLS_BACK = {"cut-manifest": (0,), "newer-format": (0,), "bad-chunk": (0, 1)}
"""Who says so: rank 0 reads the manifests, every rank hears of a vote."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The launch, what each rank reported by case, and the paths' contents before and after."""

    finished: Finished
    reports: dict[str, list[dict[str, Any]]]
    before: dict[str, dict[str, str]]
    after: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("bad")
    out = folder / "out"
    out.mkdir()
    described, before = {}, {}
    for name, case in CASES.items():
        path = folder / name
        shutil.copytree(trained, path)
        case.prepare(path)
        before[name] = contents(path)
        described[name] = describe(case, path)
    (folder / "cases.json").write_text(json.dumps(described))
    finished = run_ranks(RANKS, "tests/distributed/drivers/bad_input.py",
                         str(folder / "cases.json"), str(out), timeout_s=LIMIT_S)  # fmt: skip
    reports = {name: [json.loads((out / f"{name}-{rank}.json").read_text())
                      for rank in range(RANKS)] for name in CASES}  # fmt: skip
    after = {name: contents(folder / name) for name in CASES}
    return Outcome(finished, reports, before, after)


def describe(case: Case, path: Path) -> dict[str, Any]:
    """The case as the driver reads it."""
    block = case.block
    if block is not None and case.path is not None:
        block = {"path": case.path.replace("{path}", str(path)), **block}
    return {"block": block, "width": case.width, "tag": case.tag}


def contents(path: Path) -> dict[str, str]:
    """Digest of every file at and below `path`, and the empty text for directories."""
    return {
        os.path.relpath(item, path):
            hashlib.sha256(item.read_bytes()).hexdigest() if item.is_file() else ""
        for item in (path, *path.rglob("*"))
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_the_same_and_it_says_what_to_do(name: str, outcome: Outcome) -> None:
    case, reports = CASES[name], outcome.reports[name]
    for report in reports:
        assert report["error"] == case.error, report
        if case.error is None:
            assert report["step"] == case.step, report
        else:
            assert all(part in report["text"] for part in case.says), report["text"]
            assert report["text"] == reports[0]["text"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.unchanged])
def test_what_is_refused_changes_nothing_on_disk(name: str, outcome: Outcome) -> None:
    before, after = outcome.before[name], outcome.after[name]
    if CASES[name].unchanged == CHECKPOINTS:
        before, after = only_checkpoints(before), only_checkpoints(after)
    assert after == before


def only_checkpoints(listing: dict[str, str]) -> dict[str, str]:
    """Without the records of launches, which a launch that got as far as its claim leaves."""
    return {name: digest for name, digest in listing.items() if name.startswith("step-")}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_falling_back_to_an_older_checkpoint_is_said_loudly(name: str, outcome: Outcome) -> None:
    for rank in FALLS_BACK[name]:
        [said] = outcome.reports[name][rank]["fell_back"]
        assert all(part in said for part in CASES[name].says), said
        assert said in outcome.finished.output
    if name == "bad-chunk":
        assert "rank 0:" not in said, "only rank 1 reads the bad chunk"
