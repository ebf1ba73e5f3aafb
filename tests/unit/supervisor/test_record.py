"""What ranks and supervisor write to each other: orders, errors of the script, the deadline."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from spotspeed.config import NoticeConfig, SpotSpeedConfig
from spotspeed.coordinator.notice.workplace import settle
from spotspeed.errors import ConfigError, PeerLostError, StorageError
from spotspeed.exit import is_of_script
from spotspeed.supervised import EXPORTED, VARIABLE, heard, tell, write_order
from spotspeed.supervisor.watching import Told
from tests.ranks import ROOT

WATCHED = "from spotspeed.exit import ExitWatch; watch = ExitWatch(lambda error: watch.disarm())\n"


@pytest.fixture(autouse=True)
def unsupervised(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (VARIABLE, EXPORTED):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(("code", "errors"), [
    ("raise ValueError('mine')", ["ValueError"]),
    ("raise RuntimeError('mine, too')", ["RuntimeError"]),
    ("import sys; sys.exit(3)", ["SystemExit"]),
    ("import sys; sys.exit(76)", []),
    ("raise ConnectionResetError('a peer')", []),
    ("watch.expect(75); raise ValueError('because all leave')", []),
    ("pass", []),
])  # fmt: skip
def test_a_rank_tells_that_its_script_has_failed_by_itself(
    tmp_path: Path, code: str, errors: list[str]
) -> None:
    record = tmp_path / "launch-0"
    write_order(str(record), deadline_s=None)
    subprocess.run([sys.executable, "-c", WATCHED + code], env={EXPORTED: str(record)}, cwd=ROOT,
                   stderr=subprocess.DEVNULL, timeout=60)  # fmt: skip
    assert list(Told.read(str(record)).errors.values()) == errors


def raised_below(folder: Path, error: BaseException) -> BaseException:
    """`error`, raised by a function of a file in `folder`."""
    folder.mkdir(parents=True)
    names: dict[str, object] = {}
    exec(compile("def fail(error): raise error", str(folder / "all.py"), "exec"), names)
    try:
        names["fail"](error)  # type: ignore[operator]
    except type(error) as raised:
        return raised
    raise AssertionError


def test_what_a_collective_raises_may_be_the_loss_of_another_rank(tmp_path: Path) -> None:
    for place in ("torch/distributed", "deepspeed/comm"):
        error = raised_below(tmp_path / place, RuntimeError("Connection closed by peer"))
        assert not is_of_script(error), traceback.format_exception(error)
        assert is_of_script(raised_below(tmp_path / place / "more", ValueError("wrong argument")))
    assert is_of_script(raised_below(tmp_path / "torch" / "nn", RuntimeError("shapes differ")))
    assert is_of_script(StorageError("the store is gone"))
    assert not is_of_script(PeerLostError("rank 1"))
    assert not is_of_script(ConfigError("its own exit code says it"))


@pytest.mark.parametrize(("given", "ordered", "settled"), [
    (None, None, 120.0),
    (None, 300.0, 300.0),
    (60.0, 300.0, 60.0),
    (400.0, 300.0, 300.0),
    (400.0, None, 400.0),
])  # fmt: skip
def test_the_ranks_plan_with_the_deadline_that_the_supervisor_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: float | None,
    ordered: float | None, settled: float,
) -> None:  # fmt: skip
    record = tmp_path / "launch-0"
    write_order(str(record), deadline_s=ordered)
    monkeypatch.setenv(VARIABLE, str(record))
    tell(attached=0, epoch=1, path="p", deadline_s=1.0)
    notice = NoticeConfig() if given is None else NoticeConfig(deadline_s=given)
    config = settle(SpotSpeedConfig(path="p", notice=notice), {})
    assert config.notice.deadline_s == settled
    assert record.stat().st_mode & 0o777 == 0o600
    assert len(list(heard(str(record)))) == (1 if ordered is None else 2)
    assert Told.read(str(record)).deadline_s == 1.0, "the order is no rank's word"


def test_on_another_host_there_is_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    tell(attached=0)
    assert settle(SpotSpeedConfig(path="p"), {}).notice.deadline_s == 120.0
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
