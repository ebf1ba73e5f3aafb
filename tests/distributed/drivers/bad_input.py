"""Attach and restore once per case of `bad_input.py CASES OUT`, each rank writing what it got.

CASES is JSON: name -> {"block": ... or null, "width": ..., "tag": ...}; "{rank}" in a path becomes
the rank's number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import spotspeed
from spotspeed import events
from tests.distributed.drivers.resave import build_engine
from tests.distributed.job import ds_config


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    engines: dict[int, Any] = {}
    for name, case in cases.items():
        width = case.get("width", 64)
        if width not in engines:
            engines[width] = build_engine(ds_config(2, None), width=width)
        engine = engines[width]
        rank = engine.global_rank
        said: list[str] = []

        def listen(event: events.Event, said: list[str] = said) -> None:
            if isinstance(event, events.FellBack):
                said.append(event.describe())

        events.add_sink(listen)
        found = attempt(engine, case, rank)
        events.remove_sink(listen)
        report = {"name": name, "fell_back": said, **found}
        (out / f"{name}-{rank}.json").write_text(json.dumps(report))


def attempt(engine: Any, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """What attach and restore do with one case."""
    parameters = engine._config._param_dict
    parameters.pop("spotspeed", None)
    if case["block"] is not None:
        parameters["spotspeed"] = json.loads(json.dumps(case["block"]).replace("{rank}", str(rank)))
    try:
        checkpointer = spotspeed.attach(engine)
        restored = checkpointer.restore(case.get("tag"))
    except spotspeed.SpotSpeedError as error:
        return {"error": type(error).__name__, "text": str(error)}
    step = None if restored is None else restored.step
    if step is not None:
        assert step == engine.global_steps
    checkpointer.close()
    return {"error": None, "text": "", "step": step}


if __name__ == "__main__":
    main()
