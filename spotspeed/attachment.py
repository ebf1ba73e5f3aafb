"""Ties a checkpointer to an engine, as the engine's block says."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from spotspeed.checkpoint.session import absolute
from spotspeed.checkpointer import Checkpointer
from spotspeed.config import SpotSpeedConfig
from spotspeed.coordinator.notice.workplace import path_hint, settle
from spotspeed.errors import ConfigError, OccupiedError, SpotSpeedError
from spotspeed.exit import watch_refusals
from spotspeed.rehearsal import VARIABLE, rehearsal_here
from spotspeed.rehearsing import Rehearsing, redirected, rehearse
from spotspeed.state import boundary
from spotspeed.state.engine import Engine, require_block
from spotspeed.state.late import Stateful, source_of

_logger = logging.getLogger("spotspeed")
_tied: Counter[str] = Counter()
"""The last place that an engine of this process has, or has found taken, by path."""
_rehearsed: list[str] = []
"""The paths of engines that `spotspeed certify` trains in this process: one."""


def attach(
    engine: Engine, *, loader: Any = None, state: Mapping[str, Stateful] | None = None
) -> Checkpointer:
    """Checkpoint `engine` from now on, as its config's "spotspeed" block says.

    Call it on every rank right after `deepspeed.initialize`; `loader`, a DataLoader of a map-style
    data set, is what `Checkpointer.batches` iterates.

    `state` names objects with state_dict() and load_state_dict() that are saved and restored with
    the engine: small plain data and tensors, each rank its own, recorded every step. What can be
    iterated (a data source) is recorded inside `engine.step()`, everything else when the step has
    ended, at the latest when the next forward begins. `restore` gives each rank its own state back;
    on another number of ranks all get rank 0's. Where a notice left no time for a step to end,
    `restore` takes the newest checkpoint that has its state.

    An engine that has a checkpointer keeps it: under `spotspeed.run` the one that it was given when
    it was built, which takes `loader` and `state` over.

    Raises ConfigError for a block that is missing or wrong, UnsupportedLayoutError for a layout
    that spotspeed does not know, and OwnedError when another living job has the path; the same on
    every rank.
    """
    watch_refusals()
    block = require_block(engine, path_hint=path_hint(os.environ))
    known = attached_to(engine)
    if known is not None:
        return _take_over(known, loader, state or {})
    return _tie(engine, block, loader, state=state)


def attached_to(engine: Engine) -> Checkpointer | None:
    """The checkpointer that the engine has."""
    binding = boundary.binding_of(engine)
    hooks = None if binding is None else binding.hooks
    if isinstance(hooks, Rehearsing):
        return hooks.inner
    return hooks if isinstance(hooks, Checkpointer) else None


def attach_next(engine: Engine) -> Checkpointer:
    """As `attach`, for an engine that shares its config with others, as in a script with several.

    Each goes on in the next launch where it was: the second engine made with a path lives at
    `engine-2` below it, and so on, in the order in which the script makes them. What another
    process of the script has at the moment is passed over, and what it has done with.
    """
    watch_refusals()
    config = require_block(engine, path_hint=path_hint(os.environ))
    path = absolute(config.path)
    while True:
        _tied[path] += 1
        try:
            checkpointer = _tie(engine, config, number=_tied[path])
        except OccupiedError as error:
            _logger.info("%s", error)
        except SpotSpeedError:
            _tied[path] -= 1
            raise
        else:
            _tied[path] = max(_tied[path], checkpointer.number)
            return checkpointer


def _take_over(known: Checkpointer, loader: Any, state: Mapping[str, Stateful]) -> Checkpointer:
    """Give `known` what a second `attach` brings; ConfigError where it has another already."""
    if loader is not None and known.loader not in (None, loader):
        raise ConfigError("this engine is attached already, with another loader: attach it once")
    known.loader = known.loader if loader is None else loader
    for name, value in state.items():
        known.add_late(name, source_of(name, value))
    return known


def _tie(engine: Engine, config: SpotSpeedConfig, loader: Any = None, *,
         state: Mapping[str, Stateful] | None = None, number: int = 0) -> Checkpointer:  # fmt: skip
    rehearsal = rehearsal_here()
    if rehearsal is not None and _rehearsed:
        raise ConfigError(
            f"{VARIABLE}: this script makes several engines, and a rehearsal is of one: certify a "
            f"script that trains one engine"
        )
    origin = config.path
    if rehearsal is not None:
        _rehearsed.append(origin)
        config, number = redirected(rehearsal, config), 0
    block = settle(config, os.environ)
    try:
        checkpointer = Checkpointer(engine, block, loader, state=state, number=number)
        if rehearsal is not None:
            rehearse(checkpointer, rehearsal, origin)
        return checkpointer
    except SpotSpeedError:
        boundary.unbind(engine)
        raise
