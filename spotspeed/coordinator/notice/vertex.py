"""Vertex AI custom jobs: Compute Engine's rules, and a folder for checkpoints.

Source: "Environment variables for special Cloud Storage directories" of the Vertex AI documentation
and "Preemptible VM instances" of Compute Engine's.
"""

from __future__ import annotations

from collections.abc import Mapping

from spotspeed.coordinator.notice.contract import Workplace

SHUTDOWN_S = 30.0
"""What a preempted VM has; the metadata server may announce it earlier."""


def vertex_workplace(environ: Mapping[str, str]) -> Workplace | None:
    """The custom job that this container belongs to."""
    folder = environ.get("AIP_CHECKPOINT_DIR", "")
    if not folder and not environ.get("CLOUD_ML_JOB_ID"):
        return None
    why = "AIP_CHECKPOINT_DIR" if folder else "CLOUD_ML_JOB_ID"
    return Workplace("Vertex AI", why, SHUTDOWN_S, path_hint=folder)
