"""Save and load any engine with one call: asynchronous or not, with or without a config block.

    handle = spotspeed.async_save(engine, "/shared/checkpoints/run-7", client_state={"epoch": 3})
    ...                                   # train on; the next update waits for the copy alone
    handle.wait()                         # durable
    restored = spotspeed.load(engine, "/shared/checkpoints/run-7")

With a "spotspeed" block in the config, checkpoints live at the block's `path`, and a `path` given
here gets markers, as with `engine.save_checkpoint`. Without a block, `path` is where they live; it
belongs to this job until the engine is destroyed or the process ends, and one engine has one such
path at a time: another path waits until all is durable at the one before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from spotspeed import dropin
from spotspeed.attachment import attach
from spotspeed.checkpoint.agreement import PATIENCE_S, share
from spotspeed.checkpoint.catalog import CheckpointInfo, describe, scan
from spotspeed.checkpoint.marker import Marker
from spotspeed.checkpoint.queue import SaveHandle
from spotspeed.checkpoint.restore import Restored
from spotspeed.checkpoint.session import absolute
from spotspeed.checkpointer import Checkpointer
from spotspeed.config import IntervalConfig, NoticeConfig, SpotSpeedConfig, refusal_of
from spotspeed.core.manifest import check_name
from spotspeed.dropin import Request
from spotspeed.errors import ConfigError, FormatError, ObjectNotFoundError, SpotSpeedError
from spotspeed.state import boundary
from spotspeed.state.engine import Engine, block_of
from spotspeed.storage import open_storage

Path = str | os.PathLike[str]


def async_save(
    engine: Engine,
    path: Path | None = None,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
) -> SaveHandle:
    """Save the training state as it is now; returns before a byte of it is copied.

    Every rank calls it, between two calls of `engine.step()`; no collective of the training is
    used. `tag` is "step-N" by default, or "global_stepN" where markers are written. `client_state`
    is plain data with tensors and arrays, copied before this returns; rank 0's is kept. Several
    saves may be in flight; they become durable in their order.

    The handle's `staging_completion` and `upload_completion` are concurrent futures; the first
    resolves when the tensors may be changed (`engine.step()` waits for that by itself), the second
    when the checkpoint is durable; on rank 0, which writes the markers, when they are, too.

    Raises CaptureError naming the key path of what cannot be stored, ConfigError without a path,
    for one that cannot be written to, or for a tag that is no name; the same on every rank.
    CoordinationError names the ranks that do not call: at once when they have begun another
    training forward, else after `coordinator.asking_timeout_s` (30 s), for who is late as well; the
    training may go on. What fails later comes out of the futures.
    """
    checkpointer = _checkpointer_of(engine, path)
    asking_s = checkpointer.config.coordinator.asking_timeout_s
    return _begin(checkpointer, path, tag, client_state, asking_s=asking_s)


def save(
    engine: Engine,
    path: Path | None = None,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
) -> CheckpointInfo:
    """As `async_save`, and wait until the checkpoint is durable: what was stored, on every rank.

    As in `engine.save_checkpoint`, ranks that are late are waited for, up to ten minutes.
    Raises what went wrong on any rank, on every rank.
    """
    checkpointer = _checkpointer_of(engine, path)
    stored = describe(dropin.wait_all(checkpointer, _begin(checkpointer, path, tag, client_state)))
    # Rank 0 knows whether the same content was there before, and which of the two is kept.
    answer = share(checkpointer.exchange, "saved-as", checkpointer.rank, lambda: asdict(stored))
    return CheckpointInfo(**answer)


def load(engine: Engine, path: Path | None = None, tag: str | None = None) -> Restored:
    """Fill the engine from the newest checkpoint at `path`, or from the one tagged `tag`.

    Any number of ranks and any ZeRO stage may have written it. With a block, `path` is a directory
    of markers or another run's catalogue (a warm start: what follows is saved at the block's own).
    May be called at any time between two steps, also after training has begun; saves in flight are
    finished first. `client_state` of what is returned is what the save was given.

    Raises ObjectNotFoundError when there is no such checkpoint, CorruptionError when none verifies,
    ReshardError when it is of another model; the same on every rank.
    """
    if not isinstance(tag, str | None):
        raise TypeError(f"tag: expected text, found {tag!r}")
    _refuse_nothing(engine, path)
    checkpointer = _checkpointer_of(engine, path)
    folder = _folder_of(checkpointer, path)
    if folder is None:
        restored = checkpointer.load(checkpointer.storage, checkpointer.seat, tag)
        if restored is None:
            raise ObjectNotFoundError(f"{checkpointer.storage.url}: there is no checkpoint")
        return restored
    checkpointer.settle()
    found = dropin.find(checkpointer, folder, tag)
    if found["marker"] is None and _is_catalogue(checkpointer, folder):
        restored = checkpointer.load(open_storage(folder), checkpointer.seat, tag)
        if restored is not None:
            return restored
    if found["marker"] is None:
        raise ObjectNotFoundError(
            f"{folder}: there is no checkpoint{'' if tag is None else f' {tag!r}'}; with a "
            f'"spotspeed" block the checkpoints themselves are at {checkpointer.storage.url}'
        )
    return dropin.load_marked(checkpointer, Marker(**found["marker"]), {})


def _is_catalogue(checkpointer: Checkpointer, folder: str) -> bool:
    """Whether checkpoints themselves are in `folder`; the same on all ranks."""
    answer = share(checkpointer.exchange, "find-catalogue", checkpointer.rank,
                   lambda: {"found": bool(scan(open_storage(folder)).sealed)})  # fmt: skip
    return bool(answer["found"])


def _begin(
    checkpointer: Checkpointer,
    path: Path | None,
    tag: str | None,
    client_state: Mapping[str, Any] | None,
    *,
    asking_s: float = PATIENCE_S,
) -> SaveHandle:
    folder, step = _folder_of(checkpointer, path), int(checkpointer.engine.global_steps)
    if tag is None:
        tag = f"step-{step}" if folder is None else f"global_step{step}"
    try:
        check_name("tag", tag)
    except FormatError as error:
        raise ConfigError(str(error)) from None
    return dropin.begin(checkpointer, Request(folder, tag, client_state, asking_s=asking_s))


def _folder_of(checkpointer: Checkpointer, path: Path | None) -> str | None:
    """Where markers belong: None when `path` is the catalogue itself."""
    wanted = None if path is None else _text_of(path)
    return None if wanted in (None, absolute(checkpointer.config.path)) else wanted


def _text_of(path: Path) -> str:
    """`path` made absolute; ConfigError when it is empty, TypeError when it is no text."""
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path: expected text or a path object, found {text!r}")
    if not text.strip() or "\0" in text:
        raise ConfigError(f"path {text!r} names nothing: give a directory or a URL")
    if refusal := refusal_of(text):
        raise ConfigError(f"path {text!r}: {refusal}")
    return absolute(text)


def _refuse_nothing(engine: Engine, path: Path | None) -> None:
    """Do not begin a catalogue in order to load from it."""
    if path is not None and boundary.binding_of(engine) is None and block_of(engine) is None:
        where = _text_of(path)
        if "://" not in where and not os.path.isdir(where):
            raise ObjectNotFoundError(f"{where}: there is no such directory, so no checkpoint")


def _checkpointer_of(engine: Engine, path: Path | None) -> Checkpointer:
    """The engine's checkpointer: attached, or made here; collective when it has to be made."""
    binding = boundary.binding_of(engine)
    found = None if binding is None else binding.hooks
    if isinstance(found, Checkpointer):
        if not found.is_implicit or _folder_of(found, path) is None:
            return found
        found.close()
    if block_of(engine) is not None:
        return attach(engine)
    if path is None:
        raise ConfigError(
            'path: needed, because the DeepSpeed config has no "spotspeed" block that names one'
        )
    config = SpotSpeedConfig(
        path=_text_of(path),
        interval=IntervalConfig(seconds=None),
        notice=NoticeConfig(signals=(), cloud="none"),
    )
    try:
        return Checkpointer(engine, config, is_implicit=True)
    except SpotSpeedError:
        boundary.unbind(engine)
        raise
