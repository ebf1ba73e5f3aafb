"""DeepSpeed's `ds_to_universal`, for folders in which spotspeed has left its markers.

What it makes of DeepSpeed's files can be loaded by any number of ranks. A checkpoint of spotspeed
can be as it is, so the folder that was asked for gets a marker of the same data, and
`engine.load_checkpoint` with `load_universal` takes it: with all that the conversion drops (frozen
weights, buffers, hyper-parameters of each group, states of other optimizers than Adam).
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable
from typing import Any

from spotspeed.checkpoint.marker import LATEST_UNIVERSAL_FILE, read_marker, write_marker
from spotspeed.state.imports import after_import
from spotspeed.storage import open_storage

_MODULE = "deepspeed.checkpoint.ds_to_universal"
_originals: list[Callable[[Any], Any]] = []
"""DeepSpeed's own function."""
_logger = logging.getLogger("spotspeed")


def plug_in() -> None:
    """Let `ds_to_universal.main` take both kinds of folders; again is harmless."""
    after_import(_MODULE, _wrap)


def _wrap(module: Any) -> None:
    """Change the function itself: scripts and tests have imported it by its name before."""
    main = module.main
    if _originals:
        return
    _originals.append(types.FunctionType(main.__code__, main.__globals__, main.__name__))
    main.__code__ = _main.__code__


def _main(args: Any) -> Any:
    """What DeepSpeed's `main` runs from now on, among the names of its own module."""
    from spotspeed.integrations.deepspeed_universal import convert

    return convert(args)


def convert(args: Any) -> Any:
    """`ds_to_universal.main`: a marker where there is one, else DeepSpeed's conversion."""
    if not point(args.input_folder, args.output_folder):
        return _originals[0](args)
    return None


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
