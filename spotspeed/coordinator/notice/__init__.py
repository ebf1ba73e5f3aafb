"""Where interruption notices come from: one module a source."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from spotspeed.config import NoticeConfig
from spotspeed.coordinator.notice.azure import azure_source
from spotspeed.coordinator.notice.contract import Notice, NoticeListener, NoticeSource
from spotspeed.coordinator.notice.detect import tell_platform
from spotspeed.coordinator.notice.ec2 import ec2_source
from spotspeed.coordinator.notice.file import file_source
from spotspeed.coordinator.notice.gce import SHUTDOWN_S, gce_source
from spotspeed.coordinator.notice.url import KNOWN_URLS, url_source

__all__ = ["Notice", "NoticeListener", "NoticeSource", "configured_sources"]

_logger = logging.getLogger("spotspeed")


def configured_sources(
    config: NoticeConfig, environ: Mapping[str, str] = os.environ
) -> list[NoticeSource]:
    """The file and cloud sources that `config` asks for, not yet started.

    `cloud: null` finds the platform; the choice is logged. Signals are `SignalListener`'s.
    Raises ConfigError for a metadata endpoint in the environment that is not usable.
    """
    sources: list[NoticeSource] = []
    if config.file is not None:
        sources.append(file_source(config.file))
    cloud: str | None = config.cloud
    why = "the block"
    if cloud is None:
        cloud, why = tell_platform(environ)
    _logger.info(
        "notices: signals %s, file %s, cloud %s (%s)", ", ".join(config.signals) or "none",
        config.file or "none", cloud or "none", why,
    )  # fmt: skip
    if cloud == "ec2":
        sources.append(ec2_source(environ))
    elif cloud == "gce":
        is_stated = "deadline_s" in config.model_fields_set
        sources.append(gce_source(environ, seconds_left=None if is_stated else SHUTDOWN_S))
    elif cloud == "azure":
        sources.append(azure_source(environ))
    elif cloud in KNOWN_URLS:
        sources.append(url_source(cloud, KNOWN_URLS[cloud]))
    elif cloud is not None and cloud != "none":
        sources.append(url_source("url", cloud))
    return sources
