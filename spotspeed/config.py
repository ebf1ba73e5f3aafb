"""The "spotspeed" block of the DeepSpeed config: every key, its default and its unit."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from spotspeed.errors import ConfigError

BLOCK = "spotspeed"

CLOUDS = ("ec2", "gce", "azure", "alibaba", "tencent", "huawei", "none")
"""Whose metadata services are known by name."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
"""Seconds, or GB: the limit, 30 years, is what every clock and wait of the system can take."""


def _is_name(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError(
            "it names nothing; give a directory, a file or a URL, or leave the key out"
        )
    return value


PathText = Annotated[str, AfterValidator(_is_name)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class IntervalConfig(_Section):
    """When to save without being asked. Both null: only on notices and on request."""

    steps: PositiveInt | None = None
    """Save after every so many optimizer steps."""
    seconds: PositiveFloat | None = 600.0
    """Save when this many seconds have passed since the last save began."""
    adaptive: bool = False
    """Choose the interval from the measured cost of a save and the rate of interruptions."""

    def is_due(self, since_s: float) -> bool:
        """Whether the last save began so long ago that it is time for the next."""
        return self.seconds is not None and since_s >= self.seconds


class KeepConfig(_Section):
    """Which periodic and notice checkpoints stay; explicit saves are never removed."""

    last: PositiveInt = 3
    """Keep this many of the newest sealed checkpoints."""
    every_steps: PositiveInt | None = None
    """Keep, for ever, one checkpoint per so many steps."""


class NoticeConfig(_Section):
    """Where interruption notices come from."""

    signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    """Signals that mean "this machine goes away"."""
    cloud: str | None = None
    """Metadata service to watch, by name or as the http URL of one that answers 404 until then;
    "none" watches none, null finds the platform."""
    file: PathText | None = None
    """A file whose appearance is a notice."""
    deadline_s: PositiveFloat = 120.0
    """Seconds from a notice without a deadline of its own to the loss of the machine."""

    @field_validator("cloud")
    @classmethod
    def _cloud(cls, value: str | None) -> str | None:
        if value is None or value in CLOUDS or value.startswith("http://"):
            return value
        raise ValueError(f"write one of {', '.join(CLOUDS)}, or a URL that begins with http://")

    @field_validator("signals", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("signals")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refused = {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGCHLD"}
        for name in value:
            if name not in signal.Signals.__members__ or name in refused:
                raise ValueError(f"{name!r} is not a signal that can be listened to")
        return value


class StagingConfig(_Section):
    """How state leaves the training's memory."""

    host_memory_gb: PositiveFloat | None = None
    """Size of the staging pool of a node, in GB; null sizes it from the node and the state."""
    lazy: bool = True
    """Copy during the next forward and backward; false copies before a step or a save returns.

    A notice is answered at once in either case, in the middle of whatever the rank does.
    """
    check: Literal["off", "sampled", "full"] = "sampled"
    """How much of the state is digested twice to catch mutation while it is copied."""
    max_hold_s: PositiveFloat = 30.0
    """Longest time that a step is held back for a full pool before that save is abandoned."""


class CoordinatorConfig(_Section):
    """How the ranks agree."""

    transport: Literal["mpi"] | None = None
    """null: own sockets, found through MPI or the job's store; "mpi": MPI's own messages."""
    peer_timeout_s: PositiveFloat = 15.0
    """A rank that is silent for so long is lost."""
    asking_timeout_s: PositiveFloat = 30.0
    """All ranks ask for an asynchronous save within so long, or it is an error on all of them."""


class ElasticConfig(_Section):
    """What to do when the global batch does not divide by the number of ranks."""

    indivisible: Literal["refuse", "fewer_ranks", "micro_batch"] = "refuse"
    """micro_batch: take smaller micro batches; fewer_ranks: `supervise` starts it on fewer."""


class MetricsConfig(_Section):
    """Prometheus metrics."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None


class OnInterruptConfig(_Section):
    """How a process leaves once its state is durable."""

    exit_code: Annotated[int, Field(ge=1, le=255)] = 75


class SpotSpeedConfig(_Section):
    """The whole block. `null` or a missing key means "chosen for you, and logged"."""

    path: PathText
    """Where checkpoints live: a directory that all ranks see, or an fsspec URL."""
    local_path: PathText | None = None
    """Optional fast tier: a directory on each node's own disk, drained to `path`."""
    interval: IntervalConfig = IntervalConfig()
    keep: KeepConfig = KeepConfig()
    compression: Literal["zstd", "none"] | None = None
    """null: chosen from the data and the speed of the store."""
    notice: NoticeConfig = NoticeConfig()
    staging: StagingConfig = StagingConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    elastic: ElasticConfig = ElasticConfig()
    metrics: MetricsConfig = MetricsConfig()
    on_interrupt: OnInterruptConfig = OnInterruptConfig()
    take_over: bool = False
    """Take the path over from a job that still looks alive."""

    @field_validator("path")
    @classmethod
    def _outlives_process(cls, value: str) -> str:
        refusal = refusal_of(value)
        if refusal:
            raise ValueError(refusal)
        return value

    @field_validator("local_path")
    @classmethod
    def _is_directory(cls, value: str | None) -> str | None:
        scheme, separator, _ = (value or "").partition("://")
        if separator:
            raise ValueError(
                f"a {scheme}:// URL is no disk of this node; give a directory, and the URL to path"
            )
        return value


def refusal_of(path: str) -> str:
    """Why no checkpoint can be durable at `path`, whoever asks; "" when it can be."""
    if all(link.partition("://")[0] != "memory" for link in path.split("::")):
        return ""
    return (
        "a memory:// URL is the memory of one process, which the saver and the next launch do not "
        "share, so nothing there is durable; give a directory or a bucket"
    )


def parse_block(block: object, *, path_hint: str = "") -> SpotSpeedConfig:
    """The validated block; raises ConfigError naming every key that is wrong.

    `path_hint` is added where `path` is missing.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(
            f'"{BLOCK}" must be an object with at least "path", found {block!r}: write '
            f'{{"{BLOCK}": {{"path": "/shared/checkpoints/run-1"}}}}'
        )
    try:
        config = SpotSpeedConfig.model_validate(dict(block))
    except ValidationError as error:
        lines = [_explain(detail, path_hint) for detail in error.errors()]
        raise ConfigError(f'the "{BLOCK}" block is not usable:\n  ' + "\n  ".join(lines)) from None
    lines = _not_built(config)
    if lines:
        raise ConfigError(f'the "{BLOCK}" block is not usable:\n  ' + "\n  ".join(lines))
    return config


def find_block(config: Mapping[str, Any], *, path_hint: str = "") -> SpotSpeedConfig | None:
    """The block of a whole DeepSpeed config, or None when it has none."""
    return parse_block(config[BLOCK], path_hint=path_hint) if BLOCK in config else None


def near_misses(config: Mapping[str, Any]) -> list[str]:
    """Top-level keys that look like a misspelt "spotspeed" block."""
    others = [key for key in config if isinstance(key, str) and key != BLOCK]
    return difflib.get_close_matches(BLOCK, others, n=3, cutoff=0.8)


def _not_built(config: SpotSpeedConfig) -> list[str]:
    """Settings that are part of the block and that this version cannot honour."""
    asked = {
        "interval.adaptive": config.interval.adaptive,
        "metrics.port": config.metrics.port is not None,
    }
    return [f"{key}: this version has only the default; leave the key out or null"
            for key, is_asked in asked.items() if is_asked]  # fmt: skip


def _explain(detail: Any, path_hint: str) -> str:
    where = ".".join(str(part) for part in detail["loc"]) or BLOCK
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        advice = f"a directory all ranks see or an fsspec URL{path_hint}"
        return f"{where}: required, and missing; {advice}"
    return f"{where}: {detail['msg']}; found {detail['input']!r}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = SpotSpeedConfig
    for part in location:
        model = model.model_fields[part].annotation
    return sorted(model.model_fields)
