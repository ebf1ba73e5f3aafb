"""DeepSpeed's `ds_to_universal`, for folders in which spotspeed has left its markers.

What it makes of DeepSpeed's files can be loaded by any number of ranks. A checkpoint of spotspeed
can be as it is, so the folder that was asked for gets a marker of the same data, and
`engine.load_checkpoint` with `load_universal` takes it: with all that the conversion drops (frozen
weights, buffers, hyper-parameters of each group, states of other optimizers than Adam).
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from spotspeed.checkpoint.marker import LATEST_UNIVERSAL_FILE, read_marker, write_marker
from spotspeed.state.imports import after_import
from spotspeed.storage import open_storage

_MODULE = "deepspeed.checkpoint.ds_to_universal"
_MARK = "_spotspeed_hook"
_logger = logging.getLogger("spotspeed")


def plug_in() -> None:
    """Let `ds_to_universal.main` take both kinds of folders; again is harmless.

    A script that has imported the function before keeps DeepSpeed's own.
    """
    after_import(_MODULE, _wrap)


def _wrap(module: Any) -> None:
    original = module.main
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def main(args: Any) -> Any:
        if not point(args.input_folder, args.output_folder):
            return original(args)

    setattr(main, _MARK, True)
    module.main = main


def point(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
    """Let folder `target` stand for what `source` does, and be the universal one of its parent.

    False where `source` has no marker. Raises FormatError for a marker that is damaged.
    """
    parent, tag = os.path.split(os.path.abspath(source))
    marker = read_marker(open_storage(parent), tag)
    if marker is None:
        return False
    place, name = os.path.split(os.path.abspath(target))
    folder = open_storage(place)
    write_marker(folder, name, marker)
    folder.put(LATEST_UNIVERSAL_FILE, name.encode())
    _logger.warning(
        "%s holds a checkpoint of spotspeed, which any number of ranks loads as it is: %s stands "
        "for the same data (spotspeed export --to deepspeed writes DeepSpeed's files)",
        source, target,
    )  # fmt: skip
    return True
