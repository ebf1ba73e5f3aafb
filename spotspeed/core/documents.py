"""Sealed documents: canonical JSON under its own SHA-256, parsed within strict bounds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from spotspeed.errors import ChecksumMismatchError, FormatError

FORMAT_NAME = "spotspeed"
FORMAT_MAJOR = 1
FORMAT_MINOR = 1
SHARD_MINOR = 0
"""Minor version of shards, which have not changed since 1.0."""
OBJECTS_MAJOR = 2
"""Major version of receipts and manifests that refer to frozen objects (docs/FORMAT.md)."""
MINOR_OF = {FORMAT_MAJOR: FORMAT_MINOR, OBJECTS_MAJOR: 0}
"""The newest minor version of each major version of a document that this version knows."""
MAX_WORLD_SIZE = 65_536
MAX_FILE_BYTES = 2**62

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_DEPTH = 4
_MAX_CONTAINERS = MAX_WORLD_SIZE + 64
_MAX_DIGITS = 20


def check_name(what: str, name: object) -> str:
    """`name` if it is safe as one path component; raises FormatError with the rule if not."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise FormatError(
            f"{what} {name!r} is not usable as a name: at most 200 letters, digits or . _ + = -, "
            f"beginning with a letter or digit, without '..'"
        )
    return name


def canonical_json(value: Any) -> bytes:
    """The one JSON form of plain data that is hashed: sorted keys, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


_SEAL_START = b'{"body":'
_SEAL_MIDDLE = b',"sha256":"'
_SEAL_STOP = b'"}\n'


def seal(body: Mapping[str, Any]) -> bytes:
    """The stored form of a document, sealed with its own digest."""
    data = canonical_json(body)
    digest = hashlib.sha256(data).hexdigest().encode("ascii")
    return _SEAL_START + data + _SEAL_MIDDLE + digest + _SEAL_STOP


def stamp(body: Mapping[str, Any]) -> bytes:
    """A small record as canonical JSON with its own SHA-256 as one more key, "sha256"."""
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({**body, "sha256": digest}) + b"\n"


def check_stamp(raw: Any, source: str) -> dict[str, Any]:
    """The body of a parsed record; FormatError naming `source` unless its SHA-256 is right.

    Records of version 1.0 had none.
    """
    if not isinstance(raw, dict):
        raise FormatError(f"{source}: not a record")
    body = {key: value for key, value in raw.items() if key != "sha256"}
    if "sha256" in raw and raw["sha256"] != hashlib.sha256(canonical_json(body)).hexdigest():
        raise FormatError(f"{source}: its SHA-256 is not that of its content; it was damaged")
    return body


def unseal(
    data: bytes, source: str, document: str, *, limit_bytes: int
) -> tuple[dict[str, Any], str]:
    """The body of a sealed document and its digest; the digest is checked before the parsing."""
    if len(data) > limit_bytes:
        raise FormatError(f"{source}: {len(data)} bytes, at most {limit_bytes} are read")
    stop = len(data) - len(_SEAL_STOP)
    middle = stop - 64 - len(_SEAL_MIDDLE)
    if not (
        middle > len(_SEAL_START)
        and data.startswith(_SEAL_START)
        and data[middle:].startswith(_SEAL_MIDDLE)
        and data.endswith(_SEAL_STOP)
        and _HEX_SHA256.fullmatch(expected := data[stop - 64 : stop].decode("latin-1"))
    ):
        raise FormatError(f"{source}: not a sealed {document}; cut short or damaged")
    content = data[len(_SEAL_START) : middle]
    actual = hashlib.sha256(content).hexdigest()
    if expected != actual:
        raise ChecksumMismatchError(key=source, expected=expected, actual=actual)
    body = _parse(content, source)
    if body.get("format") != FORMAT_NAME or body.get("document") != document:
        raise FormatError(f"{source}: not a {FORMAT_NAME} {document}")
    _check_version(body, source)
    return body, actual


def _parse(content: bytes, source: str) -> dict[str, Any]:
    """Canonical JSON of dicts, lists, text, None and integers; FormatError for anything else.

    How many values there can be is counted first, so that hostile input costs bounded memory.
    """
    if content.count(b"{") + content.count(b"[") > _MAX_CONTAINERS or (
        content.count(b",") > 8 * _MAX_CONTAINERS
    ):
        raise FormatError(f"{source}: holds more values than any document of this format")
    try:
        body = json.loads(
            content.decode("ascii"), parse_int=_integer, parse_float=_refuse, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: does not parse: {type(error).__name__}") from error
    level = [body]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if any(isinstance(value, (dict, list)) for value in level):
        raise FormatError(f"{source}: nested more than {_MAX_DEPTH} levels deep")
    if not isinstance(body, dict) or canonical_json(body) != content:
        raise FormatError(f"{source}: not in canonical form")
    return body


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")


def _check_version(body: Mapping[str, Any], source: str) -> None:
    if field_of(body, "major", int, source) not in MINOR_OF:
        raise FormatError(
            f"{source}: format {body['major']}.{body.get('minor')!r:.80}, this version reads "
            f"{' and '.join(f'{major}.x' for major in MINOR_OF)}: install a spotspeed that knows it"
        )
    if not 0 <= field_of(body, "minor", int, source) < 2**16:
        raise FormatError(f"{source}: minor version {body['minor']}")


def check_keys(body: Mapping[str, Any], own: set[str], source: str) -> None:
    """Raise FormatError for an unknown key; those are for newer minor versions only."""
    expected = own | {"format", "document", "major", "minor"}
    unknown = sorted(set(body) - expected)
    if unknown and body["minor"] <= MINOR_OF[body["major"]]:
        raise FormatError(f"{source}: unknown key {unknown[0]!r:.80}")


def field_of(body: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    """`body[key]`, which must be a `kind`; FormatError naming `source` if not."""
    value = body.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{source}: {key} is {value!r:.80}, expected {kind.__name__}")
    return value


def build(cls: Any, raw: object, source: str) -> Any:
    """A frozen dataclass of str, int and None fields from plain data, types checked."""
    if not isinstance(raw, dict) or set(raw) != set(cls.__slots__):
        raise FormatError(f"{source}: {cls.__name__} needs exactly {sorted(cls.__slots__)}")
    for name, annotation in cls.__annotations__.items():
        allowed = {"int": int, "str": str, "str | None": (str, type(None))}[annotation]
        value = raw[name]
        if not isinstance(value, allowed) or isinstance(value, bool):  # type: ignore[arg-type]
            raise FormatError(f"{source}: {cls.__name__}.{name} is {value!r:.80}: not {annotation}")
    try:
        return cls(**raw)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def check_int(name: str, value: int, low: int, high: int) -> None:
    """Raise FormatError unless `value` is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FormatError(f"{name} is {value!r}, expected {low} to {high}")


class StoredFile(Protocol):
    """What a receipt says of a file with an index: sizes in bytes, and what the index hashes to."""

    @property
    def path(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def index_offset(self) -> int: ...

    @property
    def index_bytes(self) -> int: ...

    @property
    def index_sha256(self) -> str: ...

    @property
    def raw_bytes(self) -> int: ...


def check_file(file: StoredFile, *, least: int) -> None:
    """Raise FormatError unless every size is `least` or more and the index lies in the file."""
    for name in ("size_bytes", "index_offset", "index_bytes", "raw_bytes"):
        check_int(name, getattr(file, name), least, MAX_FILE_BYTES)
    check_sha256("index_sha256", file.index_sha256)
    if file.index_offset + file.index_bytes > file.size_bytes:
        raise FormatError(f"{file.path}: the index lies outside the file")


def check_sha256(name: str, value: str) -> None:
    """Raise FormatError unless `value` is a SHA-256 in hex."""
    if not _HEX_SHA256.fullmatch(value):
        raise FormatError(f"{name} is {value!r:.80}, expected 64 hexadecimal digits")
