"""Compile the operator that DeepSpeed builds on first use, and remove locks of builds that died.

PyTorch guards a build with a file named `lock` and waits for it without end; a build that was
killed leaves it behind. Its owner holds the file open, so a lock that no process has open is stale.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

OPERATOR = "deepspeed_shm_comm"


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


def build() -> None:
    """Build the operator, or wait for whoever builds it."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


def main() -> int:
    root = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for path in remove_stale_locks(root):
        print(f"removed the stale build lock {path}")
    is_built = (root / OPERATOR / f"{OPERATOR}.so").exists()
    if is_built and not (root / OPERATOR / "lock").exists():
        return 0
    print(f"building DeepSpeed's {OPERATOR} once, about a minute", flush=True)
    build()
    return 0


if __name__ == "__main__":
    sys.exit(main())
