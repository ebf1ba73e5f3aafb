"""A disk that remembers every change, and the states it may hold after a crash.

The model is the weakest that POSIX allows (Pillai et al., OSDI 2014, section 3): what was not
fsynced may be there or not, in any order. Of the writes to a file since its last fsync each may be
absent, whole, torn at a sector or a page (in the middle, or `every_tear`), or present in size only
(zeros). Of the changes to a directory since its last fsync any subset may have happened; a rename
happens in one step. An fsync of a file says nothing about its name, one of a directory nothing
about the directory's own name.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spotspeed.storage.posix import PosixDisk

Kind = Literal["write", "truncate", "sync_file", "set", "make", "move", "remove", "sync_directory"]
Names = dict[int, dict[str, int]]
"""Per directory, the node that each name stands for."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One change; `node` is the file or directory it is made to.

    "truncate" cuts a file to `offset` bytes or fills it up with zeros to there.
    "set" gives `name` in directory `node` to file `child`, "make" to directory `child`; "move"
    also takes `old` away; "remove" takes `name` away from `child`.
    """

    kind: Kind
    node: int
    name: str = ""
    old: str = ""
    child: int = 0
    offset: int = 0
    data: bytes = field(default=b"", repr=False)


class RecordingDisk:
    """Makes the changes below `top` for real and keeps the log of them.

    Several stores may share one, as processes share a disk. `without` names fsyncs (as in `syncs`)
    that are left out, to prove that a test would notice. `before` is called with each fsync's name
    before it is made: whatever it does happens in between.
    """

    def __init__(self, top: Path, *, without: str = "") -> None:
        self._disk = PosixDisk()
        self._without = without
        self._nodes: dict[int, int] = {}
        self._next = 1
        self.log: list[object] = []
        """Operations, and whatever a test appends between them."""
        self.syncs: dict[str, int] = {}
        """How often each fsync of the code was called, by module, function and kind."""
        self.before: Callable[[str], None] = lambda site: None
        self.top = self._add(os.stat(top).st_ino)

    def make_directory(self, directory: int, name: str) -> bool:
        if not self._disk.make_directory(directory, name):
            return False
        inode = os.stat(name, dir_fd=directory).st_ino
        self._record("make", directory, name=name, child=self._add(inode))
        return True

    def create_file(self, directory: int, name: str) -> int:
        file = self._disk.create_file(directory, name)
        self._record("set", directory, name=name, child=self._add(os.fstat(file).st_ino))
        return file

    def write(self, file: int, data: memoryview, offset: int) -> int:
        count = self._disk.write(file, data, offset)
        self._record("write", file, offset=offset, data=bytes(data[:count]))
        return count

    def write_direct(self, file: int, data: Sequence[memoryview], offset: int) -> int:
        # Past the page cache is not on stable storage: the device has a cache of its own.
        count = self._disk.write_direct(file, data, offset)
        self._record("write", file, offset=offset, data=b"".join(data)[:count])
        return count

    def start_writeback(self, file: int, offset: int, size_bytes: int) -> None:
        self._disk.start_writeback(file, offset, size_bytes)

    def sync_file(self, file: int) -> None:
        self._sync("sync_file", file)

    def sync_directory(self, directory: int) -> None:
        self._sync("sync_directory", directory)

    def rename(self, directory: int, source: str, target: str) -> None:
        child = self._child(directory, source)
        self._disk.rename(directory, source, target)
        self._record("move", directory, name=target, old=source, child=child)

    def rename_new(self, directory: int, source: str, target: str) -> None:
        child = self._child(directory, source)
        self._disk.rename_new(directory, source, target)
        self._record("move", directory, name=target, old=source, child=child)

    def link(self, directory: int, source: str, target: str) -> None:
        child = self._child(directory, source)
        self._disk.link(directory, source, target)
        self._record("set", directory, name=target, child=child)

    def unlink(self, directory: int, name: str) -> None:
        child = self._child(directory, name)
        self._disk.unlink(directory, name)
        self._record("remove", directory, name=name, child=child)

    def remove_directory(self, directory: int, name: str) -> None:
        child = self._child(directory, name)
        self._disk.remove_directory(directory, name)
        self._record("remove", directory, name=name, child=child)

    def close(self, descriptor: int) -> None:
        self._disk.close(descriptor)

    def _sync(self, kind: Kind, descriptor: int) -> None:
        code = sys._getframe(2).f_code
        site = f"{Path(code.co_filename).stem}.{code.co_name}: {kind}"
        self.before(site)
        self.syncs[site] = self.syncs.get(site, 0) + 1
        if site != self._without:
            self._record(kind, descriptor)

    def _record(self, kind: Kind, descriptor: int, **change: Any) -> None:
        """Log an Operation on what `descriptor` is open on; `change` is its other fields."""
        node = self._nodes.get(os.fstat(descriptor).st_ino)
        if node is not None:
            self.log.append(Operation(kind, node, **change))

    def _add(self, inode: int) -> int:
        # The file system gives the number of a removed file to a new one; the log must not.
        self._nodes[inode] = self._next
        self._next += 1
        return self._nodes[inode]

    def _child(self, directory: int, name: str) -> int:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return self._nodes[status.st_ino]


SECTOR_BYTES = 512
"""What a device writes in one piece at least; a page of 4096 bytes is a multiple."""
Choice = Literal["absent", "whole", "torn-512", "torn-4096", "zeros"] | int
"""What became of a change; of a write also how many of its bytes are there, from the first on."""
_OF_WRITES: tuple[Choice, ...] = ("absent", "whole", "torn-512", "torn-4096", "zeros")
_OF_NAMES: tuple[Choice, ...] = ("absent", "whole")


def choices_of(operation: Operation, *, every_tear: bool) -> tuple[Choice, ...]:
    """What may have become of a change that was not fsynced.

    With `every_tear` a write may be torn at each boundary of a sector, not only in its middle.
    """
    if operation.kind != "write":
        return _OF_NAMES
    if not every_tear:
        return _OF_WRITES
    first = SECTOR_BYTES - operation.offset % SECTOR_BYTES
    return ("absent", "whole", "zeros", *range(first, len(operation.data), SECTOR_BYTES))


class DiskState:
    """What is surely on the disk after a prefix of a log, and what may be."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._content: dict[int, bytes] = {}
        self._names: Names = {top: {}}
        self._directories = {top}
        self._pending: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        """Take the next operation of the log."""
        if operation.kind in ("sync_file", "sync_directory"):
            mine = [p for p in self._pending if p.node == operation.node]
            self._pending = [p for p in self._pending if p.node != operation.node]
            for pending in mine:
                _make(pending, "whole", self._content, self._names)
            return
        self._pending.append(operation)
        if operation.kind == "make":
            self._directories.add(operation.child)

    def everything(self) -> dict[str, bytes]:
        """The tree (path -> content) without any crash."""
        return self._tree(["whole"] * len(self._pending))

    def count(self, *, every_tear: bool) -> int:
        """How many states a crash may leave now."""
        return math.prod(len(choices_of(p, every_tear=every_tear)) for p in self._pending)

    def crash_states(
        self, rng: random.Random, limit: int, *, every_tear: bool = False
    ) -> Iterator[dict[str, bytes]]:
        """Trees (path -> content) that a crash may leave now; all if few, else a sample."""
        options = [choices_of(p, every_tear=every_tear) for p in self._pending]
        if self.count(every_tear=every_tear) <= limit:
            for choices in itertools.product(*options):
                yield self._tree(choices)
            return
        yield self._tree(["absent"] * len(options))
        yield self._tree(["whole"] * len(options))
        for _ in range(limit - 2):
            likelihood = rng.random()
            yield self._tree([
                rng.choice(option) if rng.random() < likelihood else "whole" for option in options
            ])  # fmt: skip

    def _tree(self, choices: list[Choice] | tuple[Choice, ...]) -> dict[str, bytes]:
        content = dict(self._content)
        names = {node: dict(entries) for node, entries in self._names.items()}
        for operation, choice in zip(self._pending, choices, strict=True):
            _make(operation, choice, content, names)
        tree: dict[str, bytes] = {}
        self._walk(self.top, "", (content, names), tree)
        return tree

    def _walk(
        self, node: int, prefix: str, state: tuple[dict[int, bytes], Names],
        tree: dict[str, bytes],
    ) -> None:  # fmt: skip
        content, names = state
        for name, child in names.get(node, {}).items():
            if child in self._directories:
                tree[f"{prefix}{name}/"] = b""
                self._walk(child, f"{prefix}{name}/", state, tree)
            else:
                tree[f"{prefix}{name}"] = content.get(child, b"")


class CrashStates:
    """Lays out, as real files at `place`, the distinct states that a crash of a log may leave.

    After each entry of the log: `take` it if it is an Operation, call `renew` if it is something
    that changes what is right, then judge what `laid_out` yields.
    """

    def __init__(
        self, top: int, place: Path, *, seed: int, per_point: int, every_tear: bool = False
    ) -> None:
        self._place, self._per_point, self._every_tear = place, per_point, every_tear
        self._state, self._rng = DiskState(top), random.Random(seed)
        self._seen: set[int] = set()
        self.states = self.distinct = 0
        self.sampled = 0
        """After how many entries there were more states than `per_point`."""

    def take(self, operation: Operation) -> None:
        """Make the next change of the log."""
        self._state.apply(operation)

    def renew(self) -> None:
        """More or less is promised from here on, so states that were judged may be wrong now."""
        self._seen.clear()

    def laid_out(self) -> Iterator[dict[str, bytes]]:
        """Each state (path -> content) that has not been judged yet, while it lies at the place."""
        self.sampled += self._state.count(every_tear=self._every_tear) > self._per_point
        for tree in self._state.crash_states(
            self._rng, self._per_point, every_tear=self._every_tear
        ):
            self.states += 1
            print_of = hash(frozenset(tree.items()))
            if print_of in self._seen:
                continue
            self._seen.add(print_of)
            self.distinct += 1
            shutil.rmtree(self._place, ignore_errors=True)
            self._place.mkdir(parents=True)
            write_tree(tree, self._place)
            yield tree


def write_tree(tree: dict[str, bytes], top: Path) -> None:
    """Lay out a crash state as real files; a path that ends in "/" is a directory."""
    for path, content in tree.items():
        target = top / path
        if path.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def _make(operation: Operation, choice: Choice, content: dict[int, bytes], names: Names) -> None:
    if choice == "absent":
        return
    if operation.kind == "write":
        _write(operation, choice, content)
        return
    if operation.kind == "truncate":
        before = content.get(operation.node, b"")[: operation.offset]
        content[operation.node] = before.ljust(operation.offset, b"\0")
        return
    entries = names.setdefault(operation.node, {})
    if operation.kind == "remove":
        if entries.get(operation.name) == operation.child:
            del entries[operation.name]
        return
    if operation.kind == "move":
        entries.pop(operation.old, None)
    entries[operation.name] = operation.child


def _write(operation: Operation, choice: Choice, content: dict[int, bytes]) -> None:
    data, start = operation.data, operation.offset
    if isinstance(choice, int):
        data = data[:choice]
    elif choice.startswith("torn"):
        # The first half, cut at the granularity that the device writes in one piece.
        unit = int(choice.removeprefix("torn-"))
        data = data[: len(data) // 2 // unit * unit]
    elif choice == "zeros":
        data = bytes(len(data))
    before = content.get(operation.node, b"")
    before += bytes(max(0, start - len(before)))
    content[operation.node] = before[:start] + data + before[start + len(data) :]
