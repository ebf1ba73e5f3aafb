"""Tells from the environment who runs this job, and what follows for its notices."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from spotspeed.config import SpotSpeedConfig
from spotspeed.coordinator.notice.contract import Workplace
from spotspeed.coordinator.notice.kubernetes import kubernetes_workplace
from spotspeed.coordinator.notice.sagemaker import sagemaker_workplace
from spotspeed.coordinator.notice.slurm import slurm_workplace
from spotspeed.coordinator.notice.vertex import vertex_workplace
from spotspeed.supervised import ordered_deadline_s

LEAVE_S = 2.0
"""So long before it is killed a rank leaves by itself, to say what is durable."""
_FINDERS = (sagemaker_workplace, vertex_workplace, slurm_workplace, kubernetes_workplace)
"""Managed services first: they may well run on the others."""
_logger = logging.getLogger("spotspeed")


def find_workplace(environ: Mapping[str, str]) -> Workplace | None:
    """The first that its variables tell; no file and no network is asked."""
    return next(filter(None, (find(environ) for find in _FINDERS)), None)


def path_hint(environ: Mapping[str, str]) -> str:
    """What to say where `path` is missing; "" when nothing is known."""
    found = find_workplace(environ)
    return f" ({found.name}: {found.path_hint})" if found and found.path_hint else ""


def signal_deadline_s(environ: Mapping[str, str], default_s: float) -> float:
    """What a signal leaves time for here, but no more than `default_s`."""
    found = find_workplace(environ)
    if found is None or found.grace_s is None:
        return default_s
    return min(default_s, max(1.0, found.grace_s - LEAVE_S))


def settle(config: SpotSpeedConfig, environ: Mapping[str, str]) -> SpotSpeedConfig:
    """`config` with the signals and the deadline of the place where the job runs.

    What the block says itself stays as it is, but a supervisor that was told a deadline ends the
    job then, whatever else leaves more.
    """
    settled, ordered_s = _settle_in_place(config, environ), ordered_deadline_s()
    if ordered_s is None:
        return settled
    is_given = "deadline_s" in config.notice.model_fields_set
    deadline_s = min(config.notice.deadline_s, ordered_s) if is_given else ordered_s
    notice = settled.notice.model_copy(update={"deadline_s": deadline_s})
    _logger.info("notices: the supervisor leaves %g s", deadline_s)
    return settled.model_copy(update={"notice": notice})


def _settle_in_place(config: SpotSpeedConfig, environ: Mapping[str, str]) -> SpotSpeedConfig:
    found = find_workplace(environ)
    if found is None:
        return config
    notice, given = config.notice, config.notice.model_fields_set
    changes: dict[str, object] = {}
    if "signals" not in given:
        changes["signals"] = tuple(dict.fromkeys((*notice.signals, *found.signals)))
    if "deadline_s" not in given:
        changes["deadline_s"] = signal_deadline_s(environ, notice.deadline_s)
    notice = notice.model_copy(update=changes)
    _logger.info(
        "notices: %s (%s): signals %s, %g s from a notice without a time of its own",
        found.name, found.why, ", ".join(notice.signals) or "none", notice.deadline_s,
    )  # fmt: skip
    return config.model_copy(update={"notice": notice})
