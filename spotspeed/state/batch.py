"""When the global batch does not divide by the ranks: one error that says which numbers do.

DeepSpeed asserts this while it parses its config, before there is an engine to attach to. So its
check is wrapped, at once or when DeepSpeed is imported, and for configs with a "spotspeed" block it
raises ConfigError instead. Nothing is imported here for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from spotspeed.errors import ConfigError
from spotspeed.state.imports import after_import

_MODULE = "deepspeed.runtime.config"
_MARK = "_spotspeed_explains"
_BLOCK = "spotspeed"
_SHOWN = 12
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
    small = [number for number in range(1, int(ranks**0.5) + 1) if ranks % number == 0]
    return sorted({*small, *(ranks // number for number in small)})


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
            on_refusal()
            raise ConfigError(_explain(config, ranks, fitting)) from None

    setattr(_batch_assertion, _MARK, True)
    setattr(parsed, "_batch_assertion", _batch_assertion)  # noqa: B010


def _explain(config: Mapping[str, Any], ranks: int, fitting: Sequence[int]) -> str:
    given = ", ".join(f'"{key}": {config[key]}' for key in (TRAIN, MICRO, ACCUMULATION)
                      if key in config)  # fmt: skip
    text = f"the global batch does not divide by {ranks} ranks: {given}. "
    if not fitting:
        return text + f'No number of ranks fits: make "{TRAIN}" a multiple of the rest'
    if len(fitting) == 1 and ACCUMULATION in config:
        return text + (
            f'Start it on {fitting[0]} ranks, or leave "{ACCUMULATION}" out: DeepSpeed then '
            f"derives it from the number of ranks"
        )
    near = sorted(sorted(fitting, key=lambda number: abs(number - ranks))[:_SHOWN])
    return text + f'Start it on {", ".join(map(str, near))} ranks, or change "{TRAIN}"'


def _whole(value: object) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_whole else None  # type: ignore[return-value]
