"""Ranks find each other under every kind of launch, without touching the training's own talk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port, rank_environment, run_ranks

DRIVER = "tests/distributed/drivers/transport_ranks.py"
pytestmark = pytest.mark.ranks


def reports(output: str) -> list[dict[str, object]]:
    lines = [line for line in output.splitlines() if line.startswith("REPORT ")]
    return [json.loads(line.removeprefix("REPORT ")) for line in lines]


def assert_all_met(output: str, ranks: int, through: str) -> None:
    """Every rank heard every rank, twice, and found them `through` what was expected."""
    told = reports(output)
    expected = sorted(list(range(ranks)) * 2)
    assert sorted(int(str(each["rank"])) for each in told) == expected, output
    for each in told:
        assert each["heard"] == list(range(ranks)), output
        assert f"found through {through}" in str(each["said"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_under_mpirun_with_mpi_in_use_the_ranks_meet_through_mpi(ranks: int) -> None:
    done = run_ranks(ranks, DRIVER, "mpi", timeout_s=120)
    assert_all_met(done.output, ranks, f"MPI ({ranks} ranks)")


def test_mpi_ranks_are_not_taken_for_the_jobs_ranks() -> None:
    done = run_ranks(3, DRIVER, "reversed", timeout_s=120)
    assert_all_met(done.output, 3, "MPI (3 ranks)")


def test_a_job_whose_deepspeed_found_mpi_by_itself_meets_through_mpi() -> None:
    done = run_ranks(2, DRIVER, "deepspeed", timeout_s=180)
    assert_all_met(done.output, 2, "MPI (2 ranks)")


def test_under_mpirun_a_job_that_does_not_use_mpi_is_left_without_it() -> None:
    done = run_ranks(3, DRIVER, "store", timeout_s=120)
    assert_all_met(done.output, 3, "the job's TCPStore")
    assert not any(each["is_mpi"] for each in reports(done.output))


@pytest.mark.parametrize(
    "mode", ["messages", pytest.param("messages reversed", marks=pytest.mark.full)]
)
def test_under_mpirun_the_messages_themselves_may_go_by_mpi(mode: str) -> None:
    done = run_ranks(3, DRIVER, mode, timeout_s=120)
    assert_all_met(done.output, 3, "MPI (3 ranks)")
    assert all("messages by MPI" in str(each["said"]) for each in reports(done.output))


@pytest.mark.full
def test_mpi_that_is_not_for_threads_is_refused_for_messages() -> None:
    done = run_ranks(2, DRIVER, "messages of one thread", timeout_s=120)
    told = [str(each["error"]) for each in reports(done.output)]
    assert len(told) == 2
    assert all("ConfigError" in text and "MPI_THREAD_MULTIPLE" in text for text in told)


def test_messages_by_mpi_need_an_mpi_launcher_and_mpi() -> None:
    code = """if True:
        import os, sys
        if "without mpi4py" in sys.argv:
            os.environ["PMI_SIZE"] = "2"
            sys.modules["mpi4py"] = None
        from spotspeed.config import CoordinatorConfig
        from spotspeed.coordinator.bootstrap import connect_ranks
        from spotspeed.errors import ConfigError
        try:
            connect_ranks(CoordinatorConfig(transport="mpi"), 0, 2)
        except ConfigError as error:
            print(error)
    """
    launchers = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
    environ = {name: value for name, value in os.environ.items() if name not in launchers}
    told = [
        subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=environ, text=True,
                       stdout=subprocess.PIPE, timeout=120, check=True).stdout
        for words in ([], ["without mpi4py"])
    ]  # fmt: skip
    assert "no MPI launcher started this process" in told[0]
    assert "install mpi4py" in told[1] and "mpi4py" in told[1]


def test_a_job_without_a_tcp_store_meets_in_the_file_it_has(tmp_path: Path) -> None:
    meeting = {"MEETING_FILE": str(tmp_path / "meeting")}
    done = run_ranks(2, DRIVER, "file", timeout_s=120, env=meeting)
    assert_all_met(done.output, 2, "the job's FileStore")


def test_a_rank_that_never_attaches_is_an_error_in_time_on_the_others() -> None:
    done = run_ranks(2, DRIVER, "absent", timeout_s=120)
    (told,) = reports(done.output)
    assert told["rank"] == 0
    assert "CoordinationError: the ranks did not meet" in str(told["error"])


def launched(command: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launcher_environment(port: int) -> dict[str, str]:
    """Without what mpirun's ranks are given: these launchers set it themselves."""
    environ = rank_environment(port)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name)
    return {**environ, "PYTHONPATH": str(ROOT)}


def test_under_torchrun_the_ranks_meet_in_the_agents_store() -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(port), DRIVER, "store",
    ]  # fmt: skip
    output = launched(command, launcher_environment(port))
    assert_all_met(output, 2, "the job's TCPStore")


def test_under_the_deepspeed_launcher_the_ranks_meet_in_the_jobs_store() -> None:
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2",
        "--master_port", str(port), DRIVER, "store",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = launched(command, {**launcher_environment(port), "PATH": path})
    assert_all_met(output, 2, "the job's TCPStore")
