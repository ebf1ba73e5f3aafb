"""The job files of examples/: well formed, and every word of spotspeed in them exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from spotspeed.cli_job import app, parse_plan
from spotspeed.exit import EXIT_NOT_DURABLE
from tests.ranks import ROOT

EXAMPLES = ROOT / "examples"
KUBERNETES, SLURM, SKYPILOT = (
    EXAMPLES / name for name in ("kubernetes.yaml", "slurm.sbatch", "skypilot.yaml")
)
INTERRUPTED = [75, EXIT_NOT_DURABLE]


def script_commands(text: str) -> Iterator[list[str]]:
    """Every call of spotspeed in a shell script."""
    joined = re.sub(r"\\\n", " ", text)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["spotspeed"]:
            yield words[: words.index("&")] if "&" in words else words


def job() -> dict[str, Any]:
    (found,) = (
        each for each in yaml.safe_load_all(KUBERNETES.read_text()) if each["kind"] == "Job"
    )
    spec: dict[str, Any] = found["spec"]
    return spec


def trainer() -> dict[str, Any]:
    (found,) = job()["template"]["spec"]["containers"]
    container: dict[str, Any] = found
    return container


def commands() -> Iterator[list[str]]:
    container = trainer()
    yield [*container["command"], *container["args"]]
    yield container["lifecycle"]["preStop"]["exec"]["command"]
    yield from script_commands(SLURM.read_text())
    yield from script_commands(yaml.safe_load(SKYPILOT.read_text())["run"])


def check(words: Sequence[str]) -> None:
    """Raise for a verb or an option that spotspeed does not have."""
    name, verb, *rest = words
    assert name == "spotspeed"
    if verb == "supervise":
        plan = parse_plan(list(rest))
        assert plan.command[0] in ("torchrun", "mpirun", "deepspeed"), plan.command
        return
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[verb]  # type: ignore[union-attr]
    command.make_context(verb, list(rest), resilient_parsing=False)


def test_every_spotspeed_command_of_the_job_files_exists_with_its_options() -> None:
    found = list(commands())
    assert len(found) == 4
    for words in found:
        check(words)


def test_a_verb_or_an_option_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(KeyError):
        check(["spotspeed", "notified"])
    with pytest.raises(Exception, match="--no-such"):
        check(["spotspeed", "notify", "--all", "--no-such"])
    with pytest.raises(SystemExit):
        check(["spotspeed", "supervise", "--no-such", "--", "mpirun"])


def test_the_exit_codes_of_the_kubernetes_job_are_spotspeeds() -> None:
    rules = {tuple(rule["onExitCodes"]["values"]): rule["action"]
             for rule in job()["podFailurePolicy"]["rules"] if "onExitCodes" in rule}  # fmt: skip
    assert rules == {(77,): "FailJob", tuple(INTERRUPTED): "Ignore"}
    assert job()["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy needs it"


def test_the_grace_period_of_the_pod_covers_hook_and_supervisor() -> None:
    spec = job()["template"]
    grace_s = spec["spec"]["terminationGracePeriodSeconds"]
    assert spec["metadata"]["annotations"]["spotspeed/grace-s"] == str(grace_s)
    variables = {item["name"]: item["valueFrom"]["fieldRef"]["fieldPath"]
                 for item in trainer()["env"]}  # fmt: skip
    assert variables["SPOTSPEED_POD_GRACE_S"] == "metadata.annotations['spotspeed/grace-s']"
    hook = dict(word.split("=") for word in trainer()["lifecycle"]["preStop"]["exec"]["command"]
                if "=" in word)  # fmt: skip
    assert parse_plan(trainer()["command"][2:] + trainer()["args"]).deadline.seconds < grace_s
    assert float(hook["--deadline"]) < grace_s and float(hook["--timeout"]) < grace_s


def test_the_kubernetes_job_is_one_by_its_schema() -> None:
    kubernetes = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate is not installed: pip install kubernetes-validate",
    )
    for document in yaml.safe_load_all(KUBERNETES.read_text()):
        kubernetes.validate(document, kubernetes.latest_version(), strict=True)


def test_without_a_deadline_a_supervisor_takes_what_the_scheduler_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "AIP_CHECKPOINT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert parse_plan(["--", "mpirun"]).deadline.seconds == 120.0
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert parse_plan(["--", "mpirun"]).deadline.seconds == 28.0
    assert parse_plan(["--deadline", "300", "--", "mpirun"]).deadline.seconds == 300.0


def test_the_batch_script_parses_and_requeues_what_was_interrupted(tmp_path: Path) -> None:
    """Run by bash with a supervisor and a scontrol that only say how they were called."""
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    calls = tmp_path / "calls"
    for name, code in (("spotspeed", 75), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\nexit {code}\n')
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_NTASKS": "16"}
    done = subprocess.run(["bash", str(SLURM)], env=environment, timeout=60)
    supervised, requeued = calls.read_text().splitlines()
    assert done.returncode == 75
    assert supervised.startswith("spotspeed supervise --deadline 110 -- mpirun -n 16 python")
    assert requeued == "scontrol requeue 12"


def test_a_signal_to_the_batch_shell_reaches_the_supervisor_and_its_code_counts(
    tmp_path: Path,
) -> None:
    program = tmp_path / "spotspeed"
    program.write_text(
        "#!/bin/sh\ntrap 'exit 77' USR1\nwhile kill -USR1 $PPID; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_NTASKS": "16"}
    done = subprocess.run(["bash", str(SLURM)], env=environment, timeout=60)
    assert done.returncode == 77


def test_skypilot_starts_again_what_was_interrupted() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == INTERRUPTED
    assert task["resources"]["use_spot"] is True
