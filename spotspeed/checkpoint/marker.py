"""Marker files of drop-in saves: where the data of `<folder>/<tag>` is, and what it must hash to.

    <folder>/<tag>/spotspeed.json      the marker: the store, the directory there, the digest
    <folder>/latest                    the newest tag, as DeepSpeed writes it

Frameworks look for these names; the data itself is in the job's catalogue. A marker is written
after the seal, durably, so what a marker names was complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from spotspeed.core.documents import check_stamp, stamp
from spotspeed.core.lineage import place_of
from spotspeed.core.manifest import MANIFEST_FILE, Manifest
from spotspeed.errors import (
    ConfigError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from spotspeed.storage import open_storage
from spotspeed.storage.contract import Storage, check_key

MARKER_FILE = "spotspeed.json"
LATEST_FILE = "latest"
LATEST_UNIVERSAL_FILE = "latest_universal"
"""Names what DeepSpeed's ds_to_universal has made, or was asked to make."""
MAX_MARKER_BYTES = 64 * 1024
_FORMAT = "spotspeed-marker"
_VERSION = 1
_PREFIX = re.compile(r"d[0-9a-f]{16}-")
_UNUSABLE = re.compile(r"[^A-Za-z0-9._+=-]|\.(?=\.)")


@dataclass(frozen=True, slots=True)
class Marker:
    """What stands in for a checkpoint in a directory of the user's."""

    url: str
    """The store that holds the checkpoint."""
    directory: str
    digest: str
    """SHA-256 (hex) of the sealed manifest."""
    step: int
    tag: str


def attempt_prefix(folder: str, tag: str) -> str:
    """How the attempts of saves to `<folder>/<tag>` begin; no other save's attempt does."""
    name = hashlib.sha256(f"{folder}\0{tag}".encode()).hexdigest()
    return f"d{name[:16]}-"


def is_for_a_directory(attempt: str, tag: str) -> bool:
    """Whether a save was asked for with a directory of the caller's, not for the catalogue alone.

    `tag` is the ticket's, which the catalogue's own saves have as they were given it.
    """
    return _PREFIX.match(attempt) is not None and not attempt.startswith(attempt_prefix("", tag))


def usable_name(tag: str) -> str:
    """`tag` with what a checkpoint's own tag may not contain replaced."""
    name = _UNUSABLE.sub("_", tag)[:200]
    return name if name[:1].isalnum() else f"t{name}"[:200]


def read_marker(folder: Storage, tag: str) -> Marker | None:
    """The marker of `tag`, or None when there is none; FormatError when it is damaged."""
    try:
        store, key = _place_of(folder, tag)
    except ConfigError:
        return None  # Nothing of ours can be there; what else is, DeepSpeed may know.
    try:
        data = store.get(key, MAX_MARKER_BYTES)
    except ObjectNotFoundError:
        return None
    where = f"{store.url}/{key}"
    try:
        raw = check_stamp(json.loads(data), where)
        if raw.pop("format") != _FORMAT or raw.pop("version") != _VERSION:
            raise ValueError("another format or version")
        marker = Marker(**raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where}: not a marker of a checkpoint: {error}") from error
    texts = (marker.url, marker.directory, marker.digest, marker.tag)
    if not all(isinstance(text, str) for text in texts) or place_of(marker.directory) is None:
        raise FormatError(f"{where}: does not name a checkpoint")
    return marker


def check_place(folder_path: str, tag: str) -> None:
    """Raise ConfigError where a marker of `tag` could not be written; makes the folder.

    What only a store of objects knows shows when the marker is written.
    """
    folder = open_storage(folder_path)
    try:
        store, key = _place_of(folder, tag)
        with contextlib.suppress(ObjectNotFoundError):
            store.size(key)
        if "://" not in folder_path:
            os.makedirs(folder_path, exist_ok=True)
            if not os.access(folder_path, os.W_OK | os.X_OK):
                raise PermissionError(f"no permission to write in {folder_path}")
            with contextlib.suppress(FileNotFoundError):
                os.lstat(os.path.join(folder_path, tag, MARKER_FILE))  # too long, through a file
    except OSError as error:
        raise ConfigError(f"{folder_path} cannot be written: {error}") from error
    except TransientStorageError:
        raise
    except StorageError as error:
        raise ConfigError(f"{folder_path} cannot hold tag {tag!r}: {error}") from error


def _place_of(folder: Storage, tag: str) -> tuple[Storage, str]:
    """Where the marker of `tag` is: a store and a key in it; ConfigError when it can be nowhere.

    DeepSpeed takes any name of a folder, keys are made of fewer characters.
    """
    key = f"{tag}/{MARKER_FILE}"
    try:
        return folder, check_key(key)
    except StorageError:
        parts = tag.split("/")
        if "\0" in tag or not {"", ".", ".."}.isdisjoint(parts):
            raise ConfigError(f"tag {tag!r} names no folder below {folder.url}") from None
        return open_storage(f"{folder.url.rstrip('/')}/{tag}"), MARKER_FILE


def write_marker(folder: Storage, tag: str, marker: Marker) -> None:
    """Let `tag` in `folder` stand for what `marker` names; durable on return."""
    store, key = _place_of(folder, tag)
    store.put(key, stamp({"format": _FORMAT, "version": _VERSION, **asdict(marker)}))


def read_latest(folder: Storage, file: str = LATEST_FILE) -> str | None:
    """The tag that `latest` (or its like, `file`) names, or None when it is not there.

    Raises FormatError when it names nothing: zeros are what a loss of power leaves of a file.
    """
    try:
        tag = folder.get(file, MAX_MARKER_BYTES).decode().strip()
    except ObjectNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise FormatError(f"{folder.url}/{file}: not the name of a tag") from error
    if not tag or "\0" in tag:
        raise FormatError(
            f"{folder.url}/{file}: expected the name of a tag, found "
            f"{f'{tag[:40]!r}' if tag else 'nothing'}: write one of the tags in the directory to "
            f"it, or load one by its tag"
        )
    return tag


def check_latest(folder: Storage, tag: str) -> None:
    """Raise FormatError unless something is where `tag`, which `latest` names, would be."""
    with contextlib.suppress(ConfigError):
        store, key = _place_of(folder, tag)
        if not store.list(key.removesuffix(MARKER_FILE)):
            raise FormatError(
                f"{folder.url}/{LATEST_FILE}: names the tag {tag[:200]!r}, of which there is "
                f"nothing in that directory: write one of its tags to it, or load one by its tag"
            )


def look_for(folder_path: str, tag: str | None, *, is_universal: bool = False) -> dict[str, Any]:
    """What there is of `tag` (None: of what `latest` names) in a folder, as plain data.

    "tag" is None when there is no `latest`; "marker", its fields, when the tag has none. A
    universal checkpoint of DeepSpeed's, named in a file of its own, comes before what `latest`
    names.
    """
    folder = open_storage(folder_path)
    files = (LATEST_UNIVERSAL_FILE, LATEST_FILE) if is_universal else (LATEST_FILE,)
    is_newest = tag is None
    if is_newest:
        tag = next(filter(None, (read_latest(folder, file) for file in files)), None)
    marker = None if tag is None else read_marker(folder, tag)
    if tag is not None and is_newest and marker is None:
        check_latest(folder, tag)
    return {"tag": tag, "marker": None if marker is None else asdict(marker)}


def mark(
    storage: Storage, manifest: Manifest, folder_path: str, tag: str, *, is_latest: bool
) -> None:
    """Let `<folder_path>/<tag>` stand for the sealed `manifest`; durable on return.

    What the tag stood for until now is removed from `storage` if it came from a save to this very
    place: the tag has been written over. The same step and content saved twice is so kept once. It
    is the older one that goes, which everybody has done with: another saver may be about to seal
    the newer one.
    """
    folder = open_storage(folder_path)
    before = _marked_before(folder, tag, storage)
    ticket = manifest.ticket
    marker = Marker(storage.url, ticket.directory, manifest.digest, ticket.step, tag)
    write_marker(folder, tag, marker)
    if is_latest:
        folder.put(LATEST_FILE, tag.encode())
    is_ours = before is not None and f".{attempt_prefix(folder_path, tag)}" in before
    if before is not None and is_ours and before != ticket.directory:
        _remove(storage, before)


def _marked_before(folder: Storage, tag: str, storage: Storage) -> str | None:
    """The directory that the tag stood for until now, if that is known and in `storage`."""
    try:
        marker = read_marker(folder, tag)
    except CorruptionError:
        return None
    return None if marker is None or marker.url != storage.url else marker.directory


def _remove(storage: Storage, directory: str) -> None:
    storage.delete(f"{directory}/{MANIFEST_FILE}")
    storage.delete_prefix(directory)
