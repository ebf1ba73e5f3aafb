"""What a command really asks of the kernel: its changes below a directory, recorded by strace.

Independent of spotspeed's own seam (storage/posix.py): whatever a process of the command writes,
syncs, renames or removes is seen, and comes out as the operations of testing/crash_disk.py.
sync_file_range and io_uring promise nothing here. Writes that are not seen (io_uring, mappings) are
found at the end, when the files are compared with what the recorded changes make.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotspeed.testing.crash_disk import DiskState, Kind, Operation

MARK = "/spotspeed-mark/"
"""`os.access(MARK + word, os.F_OK)` in the command leaves the word in the log."""
_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,truncate,ftruncate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "lseek,access,faccessat,faccessat2,mmap,copy_file_range,sendfile,splice,"
    "fallocate,openat2,sync,syncfs,chdir,fchdir"
)
_LINE = re.compile(
    r"(\d+) +(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)(?:<(.*?)>)?(?:\(deleted\))?(?: .*)?"
)
_DESCRIPTOR = re.compile(r"(-?\d+|AT_FDCWD)<(.*)>(?:\(deleted\))?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_PLACED = frozenset({"pwrite64", "pwritev", "pwritev2"})
"""Writes that say where; the file's own place stays as it is."""
_UNSEEN = frozenset({"copy_file_range", "splice", "fallocate", "symlink",
                     "symlinkat", "openat2", "sync", "syncfs"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """A word that the command left: it has come to that point."""

    word: str


class UnseenChangeError(Exception):
    """A change below the directory was made by a call that is not understood here."""


def strace_command(log: Path, command: Sequence[str]) -> list[str]:
    """`command` under strace, its children included; FileNotFoundError when there is no strace."""
    strace = shutil.which("strace")
    if strace is None:
        raise FileNotFoundError("strace is not installed")
    return [strace, "-f", "--seccomp-bpf", "-y", "-xx", "-s", str(1 << 28), "-e",
            f"trace={_CALLS}", "-e", "signal=none", "-o", str(log), *command]  # fmt: skip


def record(
    command: Sequence[str], top: Path, log: Path, *, env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> list[Operation | Mark]:  # fmt: skip
    """Run `command` and return its changes below `top`, an empty directory, in their order.

    Waits for every process that it leaves behind. Raises CalledProcessError when it fails.
    """
    subprocess.run(strace_command(log, command), env=env, check=True, timeout=timeout_s)
    found = list(parse(log, top))
    _check_complete(found, top)
    return found


def _check_complete(found: Sequence[Operation | Mark], top: Path) -> None:
    """Raise UnseenChangeError unless the changes make exactly the files that are there."""
    state = DiskState(1)
    for entry in found:
        if isinstance(entry, Operation):
            state.apply(entry)
    made = {path: data for path, data in state.everything().items() if not path.endswith("/")}
    there = {str(path.relative_to(top)): path.read_bytes()
             for path in top.rglob("*") if path.is_file()}  # fmt: skip
    different = sorted(path for path in made.keys() | there.keys()
                       if made.get(path) != there.get(path))  # fmt: skip
    if different:
        raise UnseenChangeError(f"not all changes were recorded: {', '.join(different[:5])}")


def parse(log: Path, top: Path) -> Iterator[Operation | Mark]:
    """The changes below `top` in a log of strace; the node of `top` itself is 1."""
    tree = _Tree(os.path.realpath(top))
    for name, arguments, result, path in _calls(log):
        yield from tree.take(name, arguments, result, path)


class _Tree:
    """Which node has which name while the log is read, and how far each file was written."""

    def __init__(self, top: str) -> None:
        self._top = top
        self._homes = {os.getcwd()}
        self._nodes: dict[str, int] = {top: 1}
        self._directories = {1}
        self._next = 2
        self._places: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def take(
        self, name: str, arguments: list[str], result: int, path: str
    ) -> Iterator[Operation | Mark]:
        """The operations of one call."""
        if name in ("access", "faccessat", "faccessat2"):
            asked = next((_text(a).decode() for a in arguments if a.startswith('"')), "")
            if asked.startswith(MARK):
                yield Mark(asked.removeprefix(MARK))
            return
        if result < 0:
            return
        self._refuse_relative(name, arguments)
        if name in ("chdir", "fchdir"):
            return
        if name in _UNSEEN or name == "mmap":
            self._refuse_unseen(name, arguments)
            return
        handler: Callable[..., Iterator[Operation]] = getattr(self, f"_{_HANDLERS[name]}")
        yield from handler(name, arguments, result, path)

    def _refuse_relative(self, name: str, arguments: list[str]) -> None:
        """A name without a directory may be anywhere; who calls must not work below `top`."""
        if name == "fchdir":
            found = _DESCRIPTOR.fullmatch(arguments[0])
            self._homes.add("" if found is None else _text(found[2]).decode())
        if name == "chdir":
            self._homes.add(_text(arguments[0]).decode())
        if any(f"{home}/".startswith(f"{self._top}/") for home in self._homes):
            raise UnseenChangeError(f"{name}: a process works below {self._top}, by relative names")

    def _refuse_unseen(self, name: str, arguments: list[str]) -> None:
        if name == "mmap" and not ("PROT_WRITE" in arguments[2] and "MAP_SHARED" in arguments[3]):
            return
        if name == "sync" or any(self._concerns(item) for item in arguments):
            raise UnseenChangeError(f"{name}({', '.join(arguments)[:300]})")

    def _concerns(self, argument: str) -> bool:
        found = _DESCRIPTOR.fullmatch(argument)
        path = _text(found[2]).decode() if found else ""
        if argument.startswith('"'):
            path = _text(argument).decode()
        return path.startswith(f"{self._top}/")

    def _open(self, name: str, arguments: list[str], _: int, path: str) -> Iterator[Operation]:
        flags = arguments[2] if name == "openat" else "O_CREAT|O_TRUNC"
        if name == "open":
            flags = arguments[1]
        if not path.startswith(f"{self._top}/"):
            return
        if "O_CREAT" in flags and path not in self._nodes:
            yield self._name("set", path, self._add(path))
        node = self._nodes.get(path)
        if node is None:
            return
        if "O_WRONLY" in flags or "O_RDWR" in flags or name == "creat":
            self._places[node] = self._sizes.get(node, 0) if "O_APPEND" in flags else 0
        if "O_TRUNC" in flags and self._sizes.get(node):
            yield self._cut(node, 0)

    def _write(self, name: str, arguments: list[str], result: int, _: str) -> Iterator[Operation]:
        node = self._node_of(arguments[0])
        if node is None:
            return
        data = b"".join(_text(text) for text in re.findall(r'"[^"]*"', ", ".join(arguments[1:])))
        data = data[:result]
        if len(data) < result:
            raise UnseenChangeError(f"{name}: {result} bytes written, {len(data)} in the log")
        if name in _PLACED:
            offset = int(arguments[-2 if name == "pwritev2" else -1])
        else:
            offset = self._places.get(node, 0)
            self._places[node] = offset + result
        self._sizes[node] = max(self._sizes.get(node, 0), offset + result)
        yield Operation("write", node, offset=offset, data=data)

    def _copy(self, _: str, arguments: list[str], result: int, __: str) -> Iterator[Operation]:
        """sendfile from a file that the command does not change, as shutil copies."""
        node, source = self._node_of(arguments[0]), _DESCRIPTOR.fullmatch(arguments[1])
        begin = re.match(r"\[(\d+)\]", arguments[2])
        if node is None or source is None or begin is None or not result:
            return
        with open(_text(source[2]), "rb") as file:
            file.seek(int(begin[1]))
            data = file.read(result)
        offset = self._places.get(node, 0)
        self._places[node] = self._sizes[node] = offset + len(data)
        yield Operation("write", node, offset=offset, data=data)

    def _seek(self, _: str, arguments: list[str], result: int, __: str) -> Iterator[Operation]:
        node = self._node_of(arguments[0])
        if node is not None:
            self._places[node] = result
        yield from ()

    def _truncate(self, name: str, arguments: list[str], *_: Any) -> Iterator[Operation]:
        if name == "ftruncate":
            node = self._node_of(arguments[0])
        else:
            node = self._nodes.get(_text(arguments[0]).decode())
        if node is not None:
            yield self._cut(node, int(arguments[1]))

    def _sync(self, _: str, arguments: list[str], *__: Any) -> Iterator[Operation]:
        node = self._node_of(arguments[0])
        if node is not None:
            yield Operation("sync_directory" if node in self._directories else "sync_file", node)

    def _rename(self, name: str, arguments: list[str], *_: Any) -> Iterator[Operation]:
        source, target = _two_paths(name == "rename", arguments)
        node = self._nodes.get(source)
        inside = target.startswith(f"{self._top}/")
        if node is None and not inside:
            return
        if node is None or not inside or os.path.dirname(source) != os.path.dirname(target):
            raise UnseenChangeError(f"rename {source} {target}: not within one directory")
        for path in [path for path in self._nodes if path.startswith(f"{source}/")]:
            self._nodes[target + path[len(source) :]] = self._nodes.pop(path)
        self._nodes[target] = self._nodes.pop(source)
        yield self._name("move", target, node, old=os.path.basename(source))

    def _link(self, name: str, arguments: list[str], *_: Any) -> Iterator[Operation]:
        source, target = _two_paths(name == "link", arguments)
        node = self._nodes.get(source)
        if node is not None:
            self._nodes[target] = node
            yield self._name("set", target, node)

    def _remove(self, name: str, arguments: list[str], *_: Any) -> Iterator[Operation]:
        path = _one_path(name in ("unlink", "rmdir"), arguments)
        node = self._nodes.get(path)
        if node is not None:
            yield self._name("remove", path, node)
            del self._nodes[path]

    def _make(self, name: str, arguments: list[str], *_: Any) -> Iterator[Operation]:
        path = _one_path(name == "mkdir", arguments)
        if path.startswith(f"{self._top}/"):
            node = self._add(path)
            self._directories.add(node)
            yield self._name("make", path, node)

    def _cut(self, node: int, size: int) -> Operation:
        self._sizes[node] = size
        return Operation("truncate", node, offset=size)

    def _name(self, kind: Kind, path: str, child: int, *, old: str = "") -> Operation:
        parent, name = os.path.split(path)
        return Operation(kind, self._nodes[parent], name=name, old=old, child=child)

    def _add(self, path: str) -> int:
        self._nodes[path] = self._next
        self._next += 1
        return self._nodes[path]

    def _node_of(self, argument: str) -> int | None:
        found = _DESCRIPTOR.fullmatch(argument)
        return None if found is None else self._nodes.get(_text(found[2]).decode())


_HANDLERS = {
    "open": "open", "openat": "open", "creat": "open", "write": "write", "writev": "write",
    "pwrite64": "write", "pwritev": "write", "pwritev2": "write", "sendfile": "copy",
    "lseek": "seek", "truncate": "truncate", "ftruncate": "truncate",
    "fsync": "sync", "fdatasync": "sync", "rename": "rename", "renameat": "rename",
    "renameat2": "rename", "link": "link", "linkat": "link", "unlink": "remove",
    "unlinkat": "remove", "rmdir": "remove", "mkdir": "make", "mkdirat": "make",
}  # fmt: skip


def _calls(log: Path) -> Iterator[tuple[str, list[str], int, str]]:
    """(name, arguments, result, path of a returned descriptor) of every finished call."""
    begun: dict[str, str] = {}
    with open(log, encoding="ascii", errors="replace") as lines:
        for line in lines:
            text = line.rstrip("\n")
            pid = text.split(" ", 1)[0]
            if text.endswith("<unfinished ...>"):
                begun[pid] = text.removesuffix("<unfinished ...>").rstrip()
                continue
            resumed = re.match(r"\d+ +<\.\.\. \w+ resumed>", text)
            if resumed is not None:
                text = begun.pop(pid, "") + text[resumed.end() :]
            found = _LINE.fullmatch(text)
            if found is not None:
                path = _text(found[5]).decode(errors="replace") if found[5] else ""
                yield found[2], found[3].split(", "), int(found[4], 0), path


def _two_paths(is_plain: bool, arguments: list[str]) -> tuple[str, str]:
    if is_plain:
        return _text(arguments[0]).decode(), _text(arguments[1]).decode()
    return _join(*arguments[:2]), _join(*arguments[2:4])


def _one_path(is_plain: bool, arguments: list[str]) -> str:
    return _text(arguments[0]).decode() if is_plain else _join(*arguments[:2])


def _join(directory: str, name: str) -> str:
    found = _DESCRIPTOR.fullmatch(directory)
    base = "" if found is None else _text(found[2]).decode()
    return os.path.normpath(os.path.join(base, _text(name).decode()))


def _text(argument: str) -> bytes:
    """The bytes of a string or path as strace -xx writes them."""
    found = _TEXT.fullmatch(argument)
    digits = (found[1] if found else argument).replace("\\x", "")
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return argument.encode()
