"""Loads of markers by engines that have no checkpointer: only the weights can be of use to them.

Such are engines without an optimizer (inference, ZeRO stage 3 included) and those whose optimizer
spotspeed does not know. They save by DeepSpeed's own means.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from spotspeed.checkpoint.agreement import all_or_none, share
from spotspeed.checkpoint.marker import MARKER_FILE, Marker, look_for
from spotspeed.checkpoint.module_state import read_module
from spotspeed.checkpoint.named import CLIENT_STATE
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.restore import read_job
from spotspeed.checkpoint.session import absolute
from spotspeed.config import NoticeConfig, SpotSpeedConfig
from spotspeed.coordinator.bootstrap import connect_ranks
from spotspeed.coordinator.coordinator import Coordinator, Cut
from spotspeed.errors import UnsupportedLayoutError
from spotspeed.state import boundary, counters
from spotspeed.state.engine import Engine, rank_of, world_size_of
from spotspeed.state.mesh import is_divided
from spotspeed.state.module import follow_weights, live_dtypes, put_module
from spotspeed.storage import open_storage


class Unattached:
    """What such an engine calls, as `boundary.StepHooks` says it."""

    def __init__(self, config: SpotSpeedConfig, *, optimizer: str) -> None:
        """`optimizer` names one whose state cannot be loaded; empty where there is none."""
        deaf = NoticeConfig(signals=(), cloud="none")
        self._config, self._optimizer = config.model_copy(update={"notice": deaf}), optimizer

    def before_update(self, engine: Any) -> None:
        pass

    def after_update(self, engine: Any) -> None:
        pass

    def before_forward(self, engine: Any) -> None:
        pass

    def on_destroy(self, engine: Any) -> None:
        pass

    def on_save(self, engine: Any, arguments: Mapping[str, Any]) -> Any:
        return boundary.PASS

    def on_load(self, engine: Any, arguments: Mapping[str, Any], original: boundary.Loader) -> Any:
        """The weights of what a marker names; without a marker, DeepSpeed's own files.

        The same on every rank, by a control plane of its own.
        """
        rank = rank_of(engine)
        if not arguments["load_dir"]:
            return boundary.PASS
        folder, tag = absolute(os.fspath(arguments["load_dir"])), arguments["tag"]
        transport = connect_ranks(self._config.coordinator, rank, world_size_of(engine))
        coordinator = Coordinator(transport, self._config, _Deaf())
        try:
            exchange = coordinator.exchange
            found = share(exchange, "find-marker", rank,
                          lambda: look_for(folder, None if tag is None else str(tag)))  # fmt: skip
            if found["marker"] is None:
                return boundary.PASS
            reader = all_or_none(
                exchange, "read-weights", lambda: self._read(engine, found["marker"], arguments)
            )
        finally:
            coordinator.close(0.0)
        path = os.path.join(folder, found["tag"], MARKER_FILE)
        return path, _put(engine, *reader, arguments)

    def _read(
        self, engine: Engine, marker: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Module state, counters and client state, all verified."""
        wants_more = arguments["load_optimizer_states"] and not arguments["load_module_only"]
        if is_divided(engine) or (self._optimizer and wants_more):
            raise UnsupportedLayoutError(
                f"{self._optimizer or 'a divided model'}: spotspeed does not know this engine's "
                f"layout: load the weights alone, with load_module_only=True, into one that is not "
                f"divided, or `spotspeed export --to deepspeed` the checkpoint first"
            )
        at = Marker(**marker)
        reader = CheckpointReader.open(open_storage(at.url), at.directory, digest=at.digest)
        job = read_job(reader, at.directory)
        module = read_module(reader, live_dtypes(engine))
        return module, dict(job["counters"]), job[CLIENT_STATE]


def _put(
    engine: Engine, state: dict[str, Any], counts: dict[str, Any], client_state: dict[str, Any],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    put_module(engine, state, is_strict=bool(arguments["load_module_strict"]),
               custom=arguments["custom_load_fn"])  # fmt: skip
    follow_weights(engine)
    if not arguments["load_module_only"]:
        counters.apply(engine, counts)
    return client_state


class _Deaf:
    """A `CutListener` of ranks that agree on a load, and on nothing else."""

    def on_notice(self, source: str, seconds_left: float) -> None:
        pass

    def on_agreed(self, cut: Cut) -> None:
        pass

    def on_capture(self, cut: Cut) -> None:
        pass

    def on_outcome(self, cut: Cut, digest: str | None, why: str) -> None:
        pass

    def on_peer_lost(self, rank: int, why: str) -> None:
        pass

    def leave(self, why: str) -> None:
        pass
