"""`engine.save_checkpoint` and `engine.load_checkpoint` of an attached engine, answered here.

Data goes to the catalogue at the block's `path`; the directory that the caller names gets markers
(checkpoint/marker.py) and `latest`, which is what frameworks look for. Arguments, return values and
the order of their evaluation are DeepSpeed's.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spotspeed.checkpoint.agreement import (
    PATIENCE_S,
    Verdict,
    all_or_none,
    share,
    share_all,
    waiting,
)
from spotspeed.checkpoint.marker import (
    LATEST_FILE,
    MARKER_FILE,
    Marker,
    attempt_prefix,
    check_place,
    look_for,
    mark,
    usable_name,
)
from spotspeed.checkpoint.module_state import read_module
from spotspeed.checkpoint.named import NOTHING, ClientState, NamedSave, encode_client_state
from spotspeed.checkpoint.reader import CheckpointReader
from spotspeed.checkpoint.rotation import watch
from spotspeed.checkpoint.same import keep_one
from spotspeed.checkpoint.session import absolute
from spotspeed.core.manifest import Manifest
from spotspeed.errors import (
    CoordinationError,
    ObjectNotFoundError,
    SpotSpeedError,
    UnsupportedLayoutError,
)
from spotspeed.state.engine import settle_parameters
from spotspeed.state.fit import Wanted
from spotspeed.state.mesh import is_divided
from spotspeed.state.module import (
    CustomLoad,
    differ,
    follow_weights,
    live_dtypes,
    put_module,
    weights_of,
)
from spotspeed.state.small import PARTS
from spotspeed.storage import open_storage

if TYPE_CHECKING:
    from spotspeed.checkpoint.queue import SaveHandle
    from spotspeed.checkpoint.restore import Restored
    from spotspeed.checkpointer import Checkpointer

_CUSTOM = "custom_load_fn"
WRITING_S = 86400.0
"""How long a rank whose part is stored waits for one that still writes; a lost one ends it."""
_logger = logging.getLogger("spotspeed")
_serials = itertools.count(1)
"""Saves in the order in which this process was asked for them: markers only move forward."""
_marking = threading.Lock()
_marked: dict[tuple[str, str | None], int] = {}


@dataclass(frozen=True, slots=True)
class Request:
    """What one save was asked for with; `folder` None keeps it in the catalogue alone."""

    folder: str | None
    tag: str
    client_state: Mapping[str, Any] | None = None
    is_latest: bool = True
    excludes_frozen: bool = False
    asking_s: float = PATIENCE_S
    """How long all ranks may take to ask for it."""


def save(checkpointer: Checkpointer, arguments: Mapping[str, Any]) -> bool:
    """`save_checkpoint`: returns True once the checkpoint and its markers are durable.

    Raises ValueError for an empty `save_dir`, AssertionError for tags that differ between ranks
    where the config says `checkpoint.tag_validation: Fail`, and what went wrong on any rank.
    """
    tag = arguments["tag"]
    request = Request(
        _folder("save_dir", arguments["save_dir"]),
        f"global_step{checkpointer.engine.global_steps}" if tag is None else str(tag),
        arguments["client_state"], bool(arguments["save_latest"]),
        bool(arguments["exclude_frozen_parameters"]),
    )  # fmt: skip
    handle = begin(checkpointer, request)
    settle_parameters(checkpointer.engine)
    wait_all(checkpointer, handle)
    return True


def begin(checkpointer: Checkpointer, request: Request) -> SaveHandle:
    """Begin a save that all ranks agree on; its handle resolves when the markers are durable."""
    agreed, client_state = _agree(checkpointer, request)
    folder, tag = agreed["folder"], agreed["tag"]
    prefix = attempt_prefix(folder or "", tag)
    named = NamedSave(usable_name(tag), prefix, client_state, request.excludes_frozen)
    if checkpointer.rank != 0:
        return checkpointer.save_named(named)
    serial = next(_serials)

    def finish(manifest: Manifest) -> Manifest:
        with _marking:
            if folder is None:
                return keep_one(checkpointer.storage, manifest, prefix)
            if _is_newest((folder, tag), serial):
                is_latest = request.is_latest and _is_newest((folder, None), serial)
                mark(checkpointer.storage, manifest, folder, tag, is_latest=is_latest)
                watch(folder, checkpointer.storage)
        return manifest

    return checkpointer.save_named(named, finish)


def _is_newest(place: tuple[str, str | None], serial: int) -> bool:
    """Whether no later save of this process has been marked there; this one is, from now on."""
    is_newest = _marked.get(place, 0) <= serial
    if is_newest:
        _marked[place] = serial
    return is_newest


def wait_all(checkpointer: Checkpointer, handle: SaveHandle) -> Manifest:
    """Wait on every rank until `handle` is done everywhere; the same error on every rank."""
    exchange = waiting(checkpointer.exchange, WRITING_S)
    # First each its own part, so that nobody waits for a seal that cannot come.
    for label, future in (
        ("stored", handle.stored_completion),
        ("saved", handle.upload_completion),
    ):
        all_or_none(exchange, label, future.result)
    return handle.wait()


def load(
    checkpointer: Checkpointer, arguments: Mapping[str, Any], original: Callable[[], Any]
) -> Any:
    """`load_checkpoint`: (path, client_state); (None, None) when `latest` is asked for and absent.

    What `original`, DeepSpeed's own loader, makes of it when the tag has no marker. A marker whose
    checkpoint is damaged or gone is an error on every rank, never (None, None). Saves in flight are
    finished first, so that what was asked for is found.
    """
    tag = arguments["tag"]
    folder = _folder("load_dir", arguments["load_dir"])
    is_universal = checkpointer.engine.load_universal_checkpoint()
    checkpointer.settle()
    found = find(checkpointer, folder, None if tag is None else str(tag), is_universal=is_universal)
    if found["tag"] is None and not is_universal:
        _logger.warning("%s has no file %r: nothing is loaded", folder, LATEST_FILE)
        return None, None
    if found["marker"] is None:
        return checkpointer.load_elsewhere(original)
    restored = load_marked(checkpointer, Marker(**found["marker"]), arguments)
    return os.path.join(folder, found["tag"], MARKER_FILE), restored.client_state


def find(
    checkpointer: Checkpointer, folder: str, tag: str | None, *, is_universal: bool = False
) -> dict[str, Any]:
    """What rank 0 finds for `tag` (None: what `latest` names) in `folder`; the same on all ranks.

    See `marker.look_for`.
    """

    def look() -> dict[str, Any]:
        return look_for(folder, tag, is_universal=is_universal)

    return share(checkpointer.exchange, "find-marker", checkpointer.rank, look)


def load_marked(
    checkpointer: Checkpointer, marker: Marker, arguments: Mapping[str, Any]
) -> Restored:
    """Load what `marker` names, as much of it as `arguments` (of load_checkpoint) ask for."""
    is_module_only = bool(arguments.get("load_module_only", False))
    optimizer = bool(arguments.get("load_optimizer_states", True)) and not is_module_only
    schedule = bool(arguments.get("load_lr_scheduler_states", True))
    parts = set() if is_module_only else set(PARTS)
    if not optimizer:
        parts -= {"groups", "scaler", "rng"}
    if not schedule:
        parts -= {"schedule"}
    is_strict, custom = bool(arguments.get("load_module_strict", True)), arguments.get(_CUSTOM)
    # The weights of another model may come by a custom function, but not with its optimizer.
    wanted = Wanted(optimizer, is_strict, weights=custom is None or optimizer)
    seat = replace(checkpointer.seat, wanted=wanted, parts=frozenset(parts))
    storage = checkpointer.storage
    if marker.url != storage.url:
        storage = open_storage(marker.url)
    restored = checkpointer.load(storage, seat, marker.directory, marker.digest)
    if restored is None:
        raise ObjectNotFoundError(f"{marker.url}/{marker.directory} is gone")
    if custom is not None:
        _load_by(custom, checkpointer, CheckpointReader.open(storage, restored.directory), wanted)
    return restored


def _load_by(
    custom: CustomLoad, checkpointer: Checkpointer, reader: CheckpointReader, wanted: Wanted
) -> None:
    """Let `custom` put the stored module into the live one; masters follow what it has changed."""
    engine, exchange = checkpointer.engine, checkpointer.exchange
    if is_divided(engine):
        raise UnsupportedLayoutError(
            f"{_CUSTOM}: this model is divided among the ranks, and the stored one is whole: read "
            f"what you need of it with spotspeed.open_checkpoint(path).read(name, kind)"
        )
    state = all_or_none(exchange, "read-module", lambda: read_module(reader, live_dtypes(engine)))
    before = weights_of(engine) if wanted.weights else []

    def put() -> None:
        all_or_none(exchange, "custom-load", lambda: put_module(engine, state, custom=custom))
        if not wanted.weights or any(share_all(exchange, "custom", differ(engine, before))):
            follow_weights(engine)

    checkpointer.load_elsewhere(put)


def _agree(checkpointer: Checkpointer, request: Request) -> tuple[dict[str, Any], ClientState]:
    """The same request on every rank, rank 0's; and, on rank 0, the encoded client state."""
    client_state, refusal = NOTHING, None
    if checkpointer.rank == 0:
        try:
            client_state = encode_client_state(request.client_state)
            if request.folder is not None:
                check_place(request.folder, request.tag)
        except Exception as error:  # raised below, when all ranks know
            refusal = error
    kind = type(refusal).__name__ if isinstance(refusal, SpotSpeedError) else "CaptureError"
    mine = {"tag": request.tag, "folder": request.folder, "error": "" if refusal is None else kind,
            "text": str(refusal), "step": int(checkpointer.engine.global_steps)}  # fmt: skip
    with checkpointer.passing.asking():
        try:
            answers = share_all(waiting(checkpointer.exchange, request.asking_s), "save-as", mine)
        except CoordinationError as error:
            raise type(error)(f"every rank has to ask for a save, in its turn: {error}") from None
    if refusal is not None:
        raise refusal
    if answers[0]["error"]:
        raise Verdict(0, answers[0]["error"], "").kind(answers[0]["text"])
    steps = [answer["step"] for answer in answers]
    if len(set(steps)) > 1:
        raise CoordinationError(f"the ranks ask for a save at different steps: {steps[:16]}")
    _validate_tags(checkpointer, [answer["tag"] for answer in answers])
    return answers[0], client_state


def _validate_tags(checkpointer: Checkpointer, tags: Sequence[str]) -> None:
    """DeepSpeed's `checkpoint.tag_validation`: Ignore, Warn or Fail; rank 0's tag is taken."""
    engine = checkpointer.engine
    mine = tags[checkpointer.rank]
    if len(set(tags)) == 1 or not engine.checkpoint_tag_validation_enabled():
        return
    message = (
        f"[rank={checkpointer.rank}] The checkpoint tag name {mine!r} is not consistent across all "
        f"ranks: rank 0 has {tags[0]!r}. Give every rank the same tag"
    )
    if engine.checkpoint_tag_validation_fail():
        raise AssertionError(message)
    _logger.warning("%s", message)


def _folder(name: str, value: Any) -> str:
    if not value:
        raise ValueError(f"{name} must be a non-empty string, got {value!r}")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be text or a path object, got {value!r}")
    return absolute(text)
