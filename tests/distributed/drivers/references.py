"""Run one script once per config, in one process: `references.py FOLDER SCRIPT ARGUMENT ...`.

For each FOLDER/NAME.json the losses go to FOLDER/NAME.jsonl. Afterwards rank 0 writes to
FOLDER/threads.json what threads and children this process has, for a test to see what was started.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from pathlib import Path


def main() -> None:
    folder, script, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for config in sorted(folder.glob("*.json")):
        log = str(config.with_suffix(".jsonl"))
        sys.argv = [script, "--config", str(config), "--log", log, *arguments]
        runpy.run_path(script, run_name="__main__")
    if os.environ["RANK"] == "0":
        names = [thread.name for thread in threading.enumerate()]
        hooks = f"{sys.excepthook.__module__}.{sys.excepthook.__qualname__}"
        (folder / "threads.json").write_text(json.dumps({"threads": names, "excepthook": hooks}))


if __name__ == "__main__":
    main()
