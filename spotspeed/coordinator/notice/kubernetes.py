"""Kubernetes: SIGTERM to each container, SIGKILL when the pod's grace period is over.

Sources: "Pod Lifecycle" and "Downward API" of the Kubernetes documentation. The grace period is no
field of the downward API; a pod that states it in an annotation can pass it on as
SPOTSPEED_POD_GRACE_S (examples/kubernetes.yaml). preStop hooks count against it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from spotspeed.coordinator.notice.contract import Workplace

VARIABLE = "SPOTSPEED_POD_GRACE_S"
DEFAULT_GRACE_S = 30.0
"""terminationGracePeriodSeconds of a pod that does not say."""
_logger = logging.getLogger("spotspeed")


def kubernetes_workplace(environ: Mapping[str, str]) -> Workplace | None:
    """The pod that this process is in."""
    if not environ.get("KUBERNETES_SERVICE_HOST"):
        return None
    stated = environ.get(VARIABLE, "")
    grace_s = _seconds(stated)
    if stated and grace_s is None:
        _logger.warning("%s=%r is no number of seconds", VARIABLE, stated)
    why = f"{VARIABLE}={stated}" if grace_s else f"KUBERNETES_SERVICE_HOST; no {VARIABLE}"
    return Workplace(
        "Kubernetes", why, grace_s or DEFAULT_GRACE_S,
        path_hint="the mount of a ReadWriteMany volume, or a bucket's URL",
    )  # fmt: skip


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
