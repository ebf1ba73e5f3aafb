"""Compile operators that DeepSpeed builds on first use, and remove locks of builds that died.

`prewarm.py [--all]`: the one that every process of a group needs, or with it those of the CPU
optimizers, whose cases are skipped where they are not built.

PyTorch guards a build with a file named `lock` and waits for it without end; a build that was
killed leaves it behind. Its owner holds the file open, so a lock that no process has open is stale.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

NEEDED = {"deepspeed_shm_comm": "ShareMemCommBuilder"}
OPTIMIZERS = {"cpu_adam": "CPUAdamBuilder", "cpu_lion": "CPULionBuilder",
              "cpu_adagrad": "CPUAdagradBuilder"}  # fmt: skip


def is_open_anywhere(path: Path) -> bool:
    """Whether a process that we may look into has `path` open."""
    wanted = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:
            continue  # the process or the descriptor is gone, or belongs to someone else
    return False


def remove_stale_locks(root: Path) -> list[Path]:
    """Remove the lock files under `root` that nobody holds; return them."""
    # Another user's processes cannot be looked into, so another user's lock is left alone.
    own = [path for path in sorted(root.glob("*/lock")) if path.stat().st_uid == os.getuid()]
    stale = [path for path in own if not is_open_anywhere(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def build(builder: str) -> None:
    """Build the operator, or wait for whoever builds it."""
    from deepspeed.ops.op_builder import cpu

    getattr(cpu, builder)().load(verbose=False)


def main() -> int:
    root = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for path in remove_stale_locks(root):
        print(f"removed the stale build lock {path}")
    wanted = NEEDED | (OPTIMIZERS if "--all" in sys.argv[1:] else {})
    for operator, builder in wanted.items():
        is_built = (root / operator / f"{operator}.so").exists()
        if is_built and not (root / operator / "lock").exists():
            continue
        print(f"building DeepSpeed's {operator} once, about a minute", flush=True)
        try:
            build(builder)
        except (RuntimeError, ImportError) as error:
            if operator in NEEDED:
                raise
            print(f"cases with {operator} are skipped, it cannot be built here: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
