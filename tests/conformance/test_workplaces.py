"""What every scheduler and managed service tells a job by its environment."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from spotspeed.config import SpotSpeedConfig, parse_block
from spotspeed.coordinator.notice import configured_sources
from spotspeed.coordinator.notice.workplace import LEAVE_S, find_workplace, path_hint, settle
from spotspeed.errors import ConfigError

SLURM = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": "/shared/run", "SLURM_RESTART_COUNT": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "SPOTSPEED_POD_GRACE_S": "90"}
SAGEMAKER = {"SM_CURRENT_HOST": "algo-1", "SM_HOSTS": '["algo-1"]'}
SAGEMAKER_2 = {"SM_CURRENT_HOST": "algo-1", "SM_HOSTS": '["algo-1", "algo-2"]'}
VERTEX = {"AIP_CHECKPOINT_DIR": "gs://bucket/checkpoints"}
ALL = pytest.mark.parametrize(("environ", "name", "grace_s", "hint"), [
    (SLURM, "SLURM", 30.0, "/shared/run/checkpoints-12"),
    (POD, "Kubernetes", 90.0, "ReadWriteMany"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes", 30.0, "ReadWriteMany"),
    (SAGEMAKER, "SageMaker", 120.0, "/opt/ml/checkpoints, which SageMaker copies"),
    (SAGEMAKER_2, "SageMaker", 120.0, "checkpoint_s3_uri: /opt/ml/checkpoints is each host's own"),
    (VERTEX, "Vertex AI", 30.0, "gs://bucket/checkpoints"),
    # A managed service that runs on Kubernetes is what sends the signals.
    ({**POD, **VERTEX}, "Vertex AI", 30.0, "gs://bucket/checkpoints"),
    ({**POD, **SLURM}, "SLURM", 30.0, "/shared/run/checkpoints-12"),
])  # fmt: skip


def config(**notice: object) -> SpotSpeedConfig:
    return parse_block({"path": "/shared/run", "notice": notice})


@ALL
def test_it_is_found_by_its_environment_with_reason_deadline_and_a_hint(
    environ: Mapping[str, str], name: str, grace_s: float, hint: str
) -> None:
    found = find_workplace(environ)
    assert found is not None
    assert (found.name, found.grace_s) == (name, grace_s)
    assert any(variable in found.why for variable in environ)
    assert hint in found.path_hint


@ALL
def test_a_notice_without_a_time_of_its_own_ends_before_the_kill(
    environ: Mapping[str, str], name: str, grace_s: float, hint: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, "spotspeed"):
        settled = settle(config(), environ).notice
    assert settled.deadline_s == grace_s - LEAVE_S
    assert settled.signals == ("SIGTERM", "SIGUSR1")
    assert f"notices: {name} (" in caplog.text


@ALL
def test_an_error_for_want_of_a_path_says_where_checkpoints_go(
    environ: Mapping[str, str], name: str, grace_s: float, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({}, path_hint=path_hint(environ))
    assert f"({name}: " in str(caught.value) and hint in str(caught.value)


def test_what_the_block_says_stays_as_it_is() -> None:
    settled = settle(config(signals=["SIGUSR2"], deadline_s=200.0), SLURM).notice
    assert (settled.signals, settled.deadline_s) == (("SIGUSR2",), 200.0)


@pytest.mark.parametrize("environ", [
    {}, {"SLURM_CPUS_ON_NODE": "4"}, {"KUBERNETES_PORT": ""}, {"SM_HOSTS": '["algo-1"]'},
])  # fmt: skip
def test_elsewhere_nothing_changes(environ: Mapping[str, str]) -> None:
    assert settle(config(), environ) == config()
    assert path_hint(environ) == ""


@pytest.mark.parametrize("stated", ["soon", "nan", "-5", "inf", "0"])
def test_a_grace_period_that_is_none_is_not_believed(
    stated: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = find_workplace({**POD, "SPOTSPEED_POD_GRACE_S": stated})
    assert found is not None and found.grace_s == 30.0
    assert "is no number of seconds" in caplog.text


def test_a_list_of_hosts_that_is_none_is_one_host() -> None:
    found = find_workplace({**SAGEMAKER, "SM_HOSTS": "["})
    assert found is not None and found.path_hint.startswith("/opt/ml/checkpoints,")


def test_the_choice_of_a_cloud_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spotspeed"):
        configured_sources(config().notice, {"GCE_METADATA_HOST": "127.0.0.1:1"})
    assert "cloud gce (GCE_METADATA_HOST)" in caplog.text
