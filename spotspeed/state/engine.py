"""The few facts about a DeepSpeed engine that are not its training state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from spotspeed.config import BLOCK, SpotSpeedConfig, find_block, near_misses
from spotspeed.errors import ConfigError

_logger = logging.getLogger("spotspeed")
_REPLACING = ("load_module_state_dict", "_load_zero_checkpoint")
"""What DeepSpeed's `load_checkpoint` replaces state with, whichever of the two comes first."""

Engine = Any
"""A deepspeed.DeepSpeedEngine; DeepSpeed ships no types, and only this room may name it."""


def block_of(engine: Any, *, path_hint: str = "") -> SpotSpeedConfig | None:
    """The engine's validated "spotspeed" block, or None; warns of a misspelt one.

    `path_hint` joins the error of a block without `path`.
    """
    parameters = engine._config._param_dict
    if BLOCK not in parameters:
        for name in near_misses(parameters):
            _logger.warning('the DeepSpeed config has a block "%s": is "%s" meant?', name, BLOCK)
    return find_block(parameters, path_hint=path_hint)


def require_block(engine: Any, *, path_hint: str = "") -> SpotSpeedConfig:
    """The engine's block; raises ConfigError with what to write when there is none."""
    found = block_of(engine, path_hint=path_hint)
    if found is None:
        raise ConfigError(
            f'the DeepSpeed config has no "{BLOCK}" block: add "{BLOCK}": '
            f'{{"path": "/shared/checkpoints/run-1"}}'
        )
    return found


def rank_of(engine: Any) -> int:
    """The process's rank in torch.distributed, as DeepSpeed knows it."""
    return int(engine.global_rank)


def world_size_of(engine: Any) -> int:
    """The number of ranks in torch.distributed, as DeepSpeed knows it."""
    return int(engine.world_size)


def run_loader(engine: Any, loader: Callable[[], Any]) -> tuple[Future[Any], bool]:
    """What `loader`, DeepSpeed's `load_checkpoint`, came to; and whether it replaced any state.

    It first looks for files and reads them. What it then calls to put their contents into the
    engine is watched for, so that a loader that finds nothing is known to have changed nothing.
    """
    outcome: Future[Any] = Future()
    called: list[str] = []
    names = [name for name in _REPLACING if callable(getattr(engine, name, None))]
    for name in names:
        vars(engine)[name] = _noting(getattr(engine, name), name, called)
    try:
        outcome.set_result(loader())
    except Exception as error:  # raised where the ranks know of it
        outcome.set_exception(error)
    finally:
        for name in names:
            del vars(engine)[name]
    return outcome, bool(called) or len(names) < len(_REPLACING)


def _noting(method: Callable[..., Any], name: str, called: list[str]) -> Callable[..., Any]:
    def note(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return method(*args, **kwargs)

    return note


def settle_parameters(engine: Any) -> None:
    """Leave the parameters as DeepSpeed's own save leaves them; collective in ZeRO stage 3.

    There they end up partitioned but for the persistent ones, which are gathered.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
        engine.optimizer.checkpoint_event_epilogue()
