"""When the global batch does not divide by the ranks: what `elastic.indivisible` says is done.

DeepSpeed asserts this while it parses its config, before there is an engine to attach to. So its
check is wrapped, at once or when DeepSpeed is imported. For configs with a "spotspeed" block it
raises one ConfigError that says which numbers of ranks fit or, with "micro_batch", takes smaller
micro batches. Nothing is imported here for that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from spotspeed.core.batch import Division, divide, divisors
from spotspeed.errors import ConfigError
from spotspeed.state.imports import after_import
from spotspeed.supervised import tell

_logger = logging.getLogger("spotspeed")
_MODULE = "deepspeed.runtime.config"
_MARK = "_spotspeed_explains"
_BLOCK = "spotspeed"
_SHOWN = 12
FEWER_RANKS, MICRO_BATCH = "fewer_ranks", "micro_batch"
TRAIN, MICRO, ACCUMULATION = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip


def explain_batches(on_refusal: Callable[[], None]) -> None:
    """From now on DeepSpeed's check of the batch says which numbers of ranks fit.

    `on_refusal` is called before the ConfigError is raised. Only configs with a "spotspeed" block
    are concerned. Again is harmless.
    """
    after_import(_MODULE, lambda module: _wrap(module, on_refusal))


def fitting_ranks(config: Mapping[str, Any]) -> list[int]:
    """The numbers of data-parallel ranks that `config`'s batch sizes divide among, ascending."""
    train, micro, accumulation = (_whole(config.get(k)) for k in (TRAIN, MICRO, ACCUMULATION))
    if train is None:
        return []
    ranks, rest = divmod(train, (micro or 1) * (accumulation or 1))
    if rest:
        return []
    if micro and accumulation:
        return [ranks]
    return divisors(ranks)


def smaller_micro_batch(config: Mapping[str, Any], ranks: int) -> Division | None:
    """How `config`'s global batch divides among so many ranks in no larger micro batches.

    Where only the accumulation is given, the micro batch may not be larger than it makes them. None
    when no micro batch would do.
    """
    train, micro, accumulation = (_whole(config.get(k)) for k in (TRAIN, MICRO, ACCUMULATION))
    if train is None:
        return None
    return divide(train, ranks, micro=micro or train // ranks // (accumulation or 1))


def _wrap(module: ModuleType, on_refusal: Callable[[], None]) -> None:
    parsed = getattr(module, "DeepSpeedConfig", None)
    check = getattr(parsed, "_batch_assertion", None)
    if check is None or getattr(check, _MARK, False):
        return

    @functools.wraps(check)
    def _batch_assertion(self: Any) -> None:
        try:
            check(self)
        except AssertionError:
            config, ranks = self._param_dict, int(self.world_size)
            fitting = fitting_ranks(config)
            if _BLOCK not in config or _whole(config.get(TRAIN)) is None or ranks in fitting:
                raise
            policy = _policy(config)
            division = smaller_micro_batch(config, ranks) if policy == MICRO_BATCH else None
            if division is None:
                on_refusal()
                _tell_what_fits(module, config, ranks, policy)
                raise ConfigError(_explain(config, ranks, policy)) from None
            _take(self, division)
            check(self)

    setattr(_batch_assertion, _MARK, True)
    setattr(parsed, "_batch_assertion", _batch_assertion)  # noqa: B010


def _policy(config: Mapping[str, Any]) -> str:
    """`elastic.indivisible` of the block; raises ConfigError for a block that is wrong."""
    from spotspeed.config import parse_block  # pydantic, which a command line can do without

    return parse_block(config[_BLOCK]).elastic.indivisible


def _take(parsed: Any, division: Division) -> None:
    """Let DeepSpeed go on with another micro batch and accumulation, and say so."""
    was = parsed.train_micro_batch_size_per_gpu
    parsed.train_micro_batch_size_per_gpu = division.micro
    parsed.gradient_accumulation_steps = division.accumulation
    if int(getattr(parsed, "global_rank", 0)) == 0:
        _logger.warning(
            "the global batch of %d does not divide by %d ranks in micro batches of %s: each rank "
            "takes %d of %d (engine.train_micro_batch_size_per_gpu())", parsed.train_batch_size,
            int(parsed.world_size), was, division.accumulation, division.micro,
        )  # fmt: skip


def _tell_what_fits(module: ModuleType, config: Mapping[str, Any], ranks: int, policy: str) -> None:
    """Tell a supervisor on how many ranks in all it may start this job instead."""
    if policy != FEWER_RANKS:
        return
    everybody = module.dist.get_world_size() if module.dist.is_initialized() else ranks
    tell(fits=[number * everybody // ranks for number in fitting_ranks(config)])


def _explain(config: Mapping[str, Any], ranks: int, policy: str) -> str:
    given = ", ".join(f'"{key}": {config[key]}' for key in (TRAIN, MICRO, ACCUMULATION)
                      if key in config)  # fmt: skip
    text = f"the global batch does not divide by {ranks} ranks: {given}. "
    fitting = fitting_ranks(config)
    if policy == MICRO_BATCH:
        train = _whole(config[TRAIN])
        return text + (
            f"No micro batch would do. Start it on {_near(divisors(train or 1), ranks)} ranks, or "
            f'change "{TRAIN}"'
        )
    if not fitting:
        return text + f'No number of ranks fits: make "{TRAIN}" a multiple of the rest'
    fewer = [number for number in fitting if number < ranks]
    if policy == FEWER_RANKS and fewer:
        return text + (
            f"Start it on {fewer[-1]} ranks: `spotspeed supervise --relaunch --ranks N` with "
            f"{{ranks}} in the launcher's command line does so by itself"
        )
    if len(fitting) == 1 and ACCUMULATION in config:
        return text + (
            f'Start it on {fitting[0]} ranks, or leave "{ACCUMULATION}" out: DeepSpeed then '
            f"derives it from the number of ranks"
        )
    return text + (
        f'Start it on {_near(fitting, ranks)} ranks, change "{TRAIN}", or set '
        f'"elastic": {{"indivisible": "{MICRO_BATCH}"}} in the "{_BLOCK}" block'
    )


def _near(fitting: Sequence[int], ranks: int) -> str:
    return ", ".join(map(str, sorted(
        sorted(fitting, key=lambda number: abs(number - ranks))[:_SHOWN]
    )))  # fmt: skip


def _whole(value: object) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_whole else None  # type: ignore[return-value]
