"""SageMaker training jobs: SIGTERM to the container, 120 s later SIGKILL.

Sources: "How Amazon SageMaker AI Runs Your Training Image" and "Checkpoints in Amazon SageMaker AI"
of its documentation. Its toolkit does not pass SIGTERM on to the script: `spotspeed supervise` has
to be what the container runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from spotspeed.coordinator.notice.contract import Workplace

GRACE_S = 120.0
FOLDER = "/opt/ml/checkpoints"
_MARKS = ("TRAINING_JOB_ARN", "SM_CURRENT_HOST", "SM_TRAINING_ENV")


def sagemaker_workplace(environ: Mapping[str, str]) -> Workplace | None:
    """The training job that this container belongs to.

    Its checkpoint folder is copied to S3 in the background, and is each host's own.
    """
    found = next((name for name in _MARKS if environ.get(name)), None)
    if found is None:
        return None
    hint = f"{FOLDER}, which SageMaker copies to the job's checkpoint_s3_uri"
    if _host_count(environ) > 1:
        hint = f"the job's checkpoint_s3_uri: {FOLDER} is each host's own, fit for local_path"
    return Workplace("SageMaker", found, GRACE_S, path_hint=hint)


def _host_count(environ: Mapping[str, str]) -> int:
    try:
        hosts = json.loads(environ.get("SM_HOSTS", "[]"))
    except ValueError:
        return 1
    return len(hosts) if isinstance(hosts, list) else 1
