"""The commands that look at checkpoints and keep them tidy, as a user calls them."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from spotspeed import cli, cli_job
from spotspeed.checkpoint.commit import roll_forward
from spotspeed.core.layout import TensorKey
from spotspeed.core.manifest import Ticket
from spotspeed.storage.local import LocalStorage
from spotspeed.storage.throttle import Throttle
from tests.unit.checkpoint.conftest import write_checkpoint

Save = Callable[..., Ticket]


@pytest.fixture
def storage(tmp_path: Path, seal_small: Save) -> LocalStorage:
    """Three sealed checkpoints of two ranks."""
    storage = LocalStorage(tmp_path / "run")
    for step in (10, 20, 30):
        seal_small(storage, 1, step)
    return storage


assert cli_job.app is cli.app, "it has registered its verbs"


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, words)


def document(*words: str, code: int = 0) -> Any:
    """The JSON document on stdout, which is all that is there."""
    result = call(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_list_shows_the_newest_first(storage: LocalStorage) -> None:
    found = document("list", storage.url)
    assert [info["step"] for info in found["sealed"]] == [30, 20, 10]
    text = call("list", storage.url).stdout
    assert text.index("global_step30") < text.index("global_step10")


def test_show_names_every_tensor(storage: LocalStorage) -> None:
    found = document("show", storage.url, "global_step20")
    assert found["step"] == 20 and found["world_size"] == 2
    assert [(row["name"], row["kind"], row["shape"]) for row in found["tensors"]] == [
        ("weight", "fp32", [16])
    ]
    assert "weight" in call("show", storage.url).stdout


def test_verify_reads_every_byte_once(storage: LocalStorage) -> None:
    found = document("verify", storage.url)
    assert found["is_whole"] and len(found["checkpoints"]) == 3
    for one in found["checkpoints"]:
        sizes = {info.key: info.size_bytes for info in storage.list(one["directory"])}
        # The manifest, which says what to read, is not counted.
        sizes.pop(f"{one['directory']}/manifest.json")
        assert (one["bytes_read"], one["files"]) == (sum(sizes.values()), len(sizes) + 1)
    result = call("verify", storage.url, "global_step10")
    assert result.exit_code == 0 and result.stdout.count("whole") == 1


def test_a_file_damaged_by_hand_is_named_whichever_it_is(storage: LocalStorage) -> None:
    names = [info.key for info in storage.list() if "step-000000000020" in info.key]
    assert len(names) == 5
    for name in names:
        file = Path(storage.url) / name
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:-1], content + b"x", b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            if damaged is None and name.endswith("manifest.json"):
                # Nothing tells it from a save that was never sealed, unless `latest` does.
                assert len(document("verify", storage.url)["checkpoints"]) == 2
                assert document("list", storage.url)["unsealed"] == [name.split("/")[0]]
            else:
                found = document("verify", storage.url, code=1)
                said = [text for one in found["checkpoints"] for text in one["damages"]]
                assert said and all(Path(name).name in text for text in said), (name, said)
                assert call("verify", storage.url).exit_code == 1
            file.write_bytes(content)
    assert document("verify", storage.url)["is_whole"]


def test_a_damaged_manifest_is_named_by_directory_and_by_tag(storage: LocalStorage) -> None:
    directory = "step-000000000020.e000001.a"
    file = Path(storage.url) / directory / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"global_step20", b"global_step21"))
    for name in (directory, "global_step20"):
        found = document("verify", storage.url, name, code=1)
        assert not found["is_whole"]
        (damage,) = [text for one in found["checkpoints"] for text in one["damages"]]
        assert str(file) in damage
        export = ["export", storage.url, name, "x.safetensors", "--to", "safetensors"]
        for words in (["show", storage.url, name], export):
            error = document(*words, code=1)["error"]
            assert str(file) in error["message"]
    found = document("verify", storage.url, "global_step10")
    assert found["is_whole"] and len(found["checkpoints"]) == 1


def test_a_manifest_that_is_gone_is_damage_where_latest_knows_of_it(storage: LocalStorage) -> None:
    directory = "step-000000000030.e000001.a"
    (Path(storage.url) / directory / "manifest.json").unlink()
    for words in ((), (directory,), ("global_step30",)):
        found = document("verify", storage.url, *words, code=1)
        damages = {one["directory"]: one["damages"] for one in found["checkpoints"]}
        assert "manifest.json is gone" in damages.pop(directory)[0] and not any(damages.values())
    found = document("list", storage.url)
    assert [one["directory"] for one in found["lost"]] == [directory] == found["unsealed"]
    result = call("list", storage.url)
    assert "manifest.json is gone" in result.stderr and "unfinished" not in result.stdout
    assert roll_forward(storage).sealed
    assert document("verify", storage.url)["is_whole"]


def test_a_directory_that_somebody_removed_is_not_missed(storage: LocalStorage) -> None:
    storage.delete_prefix("step-000000000030.e000001.a")
    assert len(document("verify", storage.url)["checkpoints"]) == 2


def test_no_name_is_cut_where_nobody_looks_at_a_terminal(tmp_path: Path) -> None:
    """What goes through a pipe is searched by programs."""
    name = f"model.{'layers.' * 30}weight"
    write_checkpoint(tmp_path, {TensorKey("fp32", name): ("float32", np.zeros(3, np.float32))}, 1)
    assert name in call("show", str(tmp_path)).stdout


@pytest.mark.parametrize(
    "words",
    [["--to", "safetensors"], ["x", "--to", "deepspeed"], ["x", "--to", "safetensors", "--ranks",
     "2"], ["x", "--to", "deepspeed", "--ranks", "2", "--dtype", "bf16"], [".", "--to",
     "safetensors"]],
)  # fmt: skip
def test_a_command_line_that_makes_no_sense_is_code_2(
    storage: LocalStorage, words: list[str]
) -> None:
    assert call("export", storage.url, *words).exit_code == 2


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "1e300"])
def test_a_state_of_no_size_is_code_2(size: str, tmp_path: Path) -> None:
    assert call("doctor", str(tmp_path), "--state-gb", size).exit_code == 2


def test_where_there_is_no_torch_the_commands_that_need_it_say_so(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("deepspeed_export", "deepspeed_import"):
        monkeypatch.setitem(sys.modules, f"spotspeed.integrations.{module}", None)
    out = str(tmp_path / "out")
    for words in (["export", storage.url, "--to", "deepspeed", out, "--ranks", "1"],
                  ["import", str(tmp_path), "--to", out]):  # fmt: skip
        assert document(*words, code=3)["error"]["kind"] == "ConfigError"
        assert "needs PyTorch and DeepSpeed" in call(*words).output


def test_what_the_system_refuses_is_one_line(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/the/run")

    monkeypatch.setattr(cli, "scan", refuse)
    result = call("verify", storage.url)
    assert result.exit_code == 3 and result.output.count("\n") == 1
    assert "PermissionError: [Errno 13] Permission denied: '/the/run'" in result.output
    assert document("list", storage.url, code=3)["error"]["kind"] == "PermissionError"


def test_the_bar_is_for_terminals_only(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(*, is_terminal: bool, words: tuple[str, ...] = ()) -> str:
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=is_terminal, width=160, stderr=False)
        monkeypatch.setattr(cli, "errors", console)
        assert call("verify", storage.url, *words).exit_code == 0
        return screen.getvalue()

    bar = on(is_terminal=True)
    assert "step-000000000010" in bar and "49.5/49.5 KiB" in bar
    assert on(is_terminal=False) == on(is_terminal=True, words=("--json",)) == ""


def test_a_limit_holds_the_reading_back(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(
        cli, "Throttle", lambda rate: Throttle(rate, clock=lambda: 0.0, sleep=waited.append)
    )
    found = document("verify", storage.url, "global_step10", "--limit-mb", "1")
    assert max(waited) >= 0.8 * found["checkpoints"][0]["bytes_read"] / 1e6


def test_gc_says_first_what_it_then_does(storage: LocalStorage) -> None:
    planned = document("gc", storage.url, "--keep-last", "1", "--dry-run")
    assert planned["dry_run"] and len(planned["removals"]) == 2
    assert len(document("list", storage.url)["sealed"]) == 3
    done = document("gc", storage.url, "--keep-last", "1")
    assert done == planned | {"dry_run": False}
    assert [info["step"] for info in document("list", storage.url)["sealed"]] == [30]
    assert "removed 0 directories" in call("gc", storage.url).stdout


def test_what_is_not_there_is_one_line_and_code_3(tmp_path: Path) -> None:
    for words in (["show"], ["verify"]):
        result = call(*words, str(tmp_path / "nothing"))
        assert result.exit_code == 3 and "there is no sealed checkpoint" in result.output
        error = document(*words, str(tmp_path / "nothing"), code=3)["error"]
        assert error["kind"] == "ObjectNotFoundError"
    assert call("list", str(tmp_path / "nothing")).exit_code == 0


def test_an_emulated_cloud_says_where_it_is_in_either_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(signal, "sigtimedwait", lambda *_: signal.SIGTERM)
    found = document("emulate", "gce", "--after", "5")
    assert (found["cloud"], found["after_s"], found["left_s"]) == ("gce", 5.0, None)
    (address,) = found["environ"].values()
    assert address.startswith("127.0.0.1:")
    assert call("emulate", "gce").stdout.startswith("export GCE_METADATA_HOST=127.0.0.1:")
    assert document("emulate", "ec2")["left_s"] == 120.0
    assert call("emulate", "gce", "--left", "60").exit_code == 2
