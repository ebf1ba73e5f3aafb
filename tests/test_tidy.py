"""The house rules that can be counted, enforced on every file of the tree.

Each rule takes one file and yields (line, what is wrong); the tests at the end show for every rule
that it finds what it is meant to find. Reasons stand in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 6
MAX_COLUMNS = 100
MAX_TRACKED_BYTES = 1 << 20

FLOORS = {
    "cli": 6, "run": 6, "integrations": 5, "testing": 5,
    "checkpointer": 4, "supervisor": 4, "agent": 4, "report": 4,
    "checkpoint": 3,
    "state": 2, "staging": 2, "codec": 2, "storage": 2, "coordinator": 2, "sim": 2,
    "config": 1, "events": 1, "core": 1, "exit": 1,
    "errors": 0, "_native": 0, "__init__": 0,
}  # fmt: skip
ROOM_OF = {
    "__main__": "cli", "cli_certify": "cli", "cli_exchange": "cli", "cli_job": "cli",
    "launch": "run", "mainprogram": "exit",
    "interruption": "checkpointer", "attachment": "checkpointer", "children": "run",
    "rehearsal": "exit", "rehearsing": "checkpointer", "supervised": "exit",
    "doctor": "report", "api": "checkpointer", "dropin": "checkpointer",
    "planning": "checkpointer", "progress": "checkpointer", "roll_call": "checkpointer",
    "unattached": "checkpointer", "build_locks": "exit",
}  # fmt: skip
"""Modules beside the package's rooms, and the room each belongs to."""

CONFINED = {
    "deepspeed": {"state", "integrations"},
    "mpi4py": {"coordinator"},
    "torch.distributed": {"coordinator"},
    "fsspec": {"storage"},
    "zstandard": {"codec"},
    "transformers": {"integrations"},
    "accelerate": {"integrations"},
    "lightning": {"integrations"},
    "pytorch_lightning": {"integrations"},
}
IMPURE = {
    "asyncio", "concurrent", "datetime", "deepspeed", "fcntl", "logging", "mmap", "multiprocessing",
    "os", "pathlib", "queue", "random", "secrets", "select", "shutil", "signal", "socket",
    "subprocess", "tempfile", "threading", "time", "torch",
}  # fmt: skip
"""What core/ must not import: I/O, clock, threads, chance, environment, torch."""
BANNED_NAMES = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}
MAY_PRINT = {"cli"}
MAY_EXIT = {"cli", "run"}
BROAD = {"Exception", "BaseException"}
TEXT = {".py", ".pyi", ".md", ".h", ".cpp", ".cu", ".toml", ".txt", ".yml", ".yaml", ".json", ".sh"}
NATIVE = {".h", ".cpp", ".cu"}
# Spelt in parts, so that this file does not contain what it looks for.
HOMES = "|".join(["work", "root", "farm", r"home/\w+"])
MACHINE_PATH = re.compile(rf"(?<![\w.])/(?:{HOMES})/")

PRAGMA = re.compile(r"\s+# (type: ignore|noqa|fmt: skip)\S*.*$")

Finding = tuple[int, str]


@dataclass(frozen=True)
class File:
    """One file of the tree; `path` is relative to its root."""

    path: Path
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def is_package(self) -> bool:
        return self.path.parts[0] == "spotspeed" and self.path.suffix == ".py"

    @property
    def room(self) -> str:
        """The room that a module of the package belongs to."""
        name = self.path.parts[1].removesuffix(".py")
        return ROOM_OF.get(name, name)


def tree_files() -> list[Path]:
    """Every file that is tracked, or would be: relative paths."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return sorted(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())


def imports(file: File) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, also by importlib and when typing."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = file.path.with_suffix("").parts[: -node.level]
                module = ".".join([*package, *([module] if module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def check_floors(file: File) -> Iterator[Finding]:
    """A module imports lower floors or its own room, never sideways or up."""
    if not file.is_package or file.path == Path("spotspeed/__init__.py"):
        return  # the package's front door names rooms of every floor, and imports them when used
    if file.room not in FLOORS:
        yield 1, f"the room {file.room!r} has no floor; give it one in {Path(__file__).name}"
        return
    for line, name in imports(file):
        parts = name.split(".")
        if parts[0] != "spotspeed" or len(parts) < 2:
            continue
        room = ROOM_OF.get(parts[1], parts[1]) if _is_module(parts[1]) else "__init__"
        if room != file.room and FLOORS.get(room, 99) >= FLOORS[file.room]:
            yield (
                line,
                (
                    f"{file.room} (floor {FLOORS[file.room]}) imports {room} "
                    f"(floor {FLOORS.get(room, 'unknown')})"
                ),
            )


def check_confinement(file: File) -> Iterator[Finding]:
    """Each foreign package is known to few rooms, and the core is pure."""
    if not file.is_package:
        return
    for line, name in imports(file):
        for package, rooms in CONFINED.items():
            if f"{name}.".startswith(f"{package}.") and file.room not in rooms:
                yield line, f"{package} may only be imported in {', '.join(sorted(rooms))}"
        if file.room == "core" and name.split(".")[0] in IMPURE:
            yield line, f"core/ is pure and must not import {name.split('.')[0]}"


def check_length(file: File) -> Iterator[Finding]:
    """Modules stop at 400 lines, functions at 60."""
    if file.path.suffix in {".py", *NATIVE} and len(file.lines) > MAX_MODULE_LINES:
        yield MAX_MODULE_LINES + 1, f"{len(file.lines)} lines, at most {MAX_MODULE_LINES}"
    for node in _functions(file):
        count = (node.end_lineno or node.lineno) - node.lineno + 1
        if count > MAX_FUNCTION_LINES:
            yield node.lineno, f"{node.name}() has {count} lines, at most {MAX_FUNCTION_LINES}"


def check_arguments(file: File) -> Iterator[Finding]:
    """Six arguments, then a dataclass."""
    for node in _functions(file):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(given) - (bool(given) and given[0].arg in {"self", "cls"})
        if count > MAX_ARGUMENTS:
            yield node.lineno, f"{node.name}() has {count} arguments, at most {MAX_ARGUMENTS}"


def check_columns(file: File) -> Iterator[Finding]:
    """Lines end at column 100, in code and in prose; tables and addresses cannot be broken."""
    for number, text in enumerate(file.lines, 1):
        line = PRAGMA.sub("", text) if file.path.suffix == ".py" else text
        if len(line) <= MAX_COLUMNS or file.path.name == "LICENSE":
            continue
        if file.path.suffix == ".md" and ("|" in line or "://" in line):
            continue
        if file.path.suffix not in {".json", ".txt"}:
            yield number, f"{len(line)} columns, at most {MAX_COLUMNS}"


def check_docstring(file: File) -> Iterator[Finding]:
    """The first line of a module says what it does, in one sentence."""
    if file.path.suffix != ".py" or not file.tree.body:
        return
    first = (ast.get_docstring(file.tree) or "").partition("\n")[0]
    if not first:
        yield 1, "no docstring: the first line says what the module does"
    elif not first.endswith("."):
        yield 1, f"the docstring's first line is no whole sentence: {first!r}"


def check_name(file: File) -> Iterator[Finding]:
    """A module is named after one idea."""
    stems = {part.partition(".")[0] for part in file.path.parts}
    if file.path.suffix in {".py", *NATIVE} and stems & BANNED_NAMES:
        yield 1, f"{', '.join(sorted(stems & BANNED_NAMES))} names no idea"


def check_output(file: File) -> Iterator[Finding]:
    """The library speaks through events and errors, and does not end the process."""
    if not file.is_package:
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name == "print" and file.room not in MAY_PRINT:
                yield node.lineno, "print() outside the command line"
            # A program that is run as a module may end with its status.
            if name == "sys.exit" and file.room not in MAY_EXIT and file.path.stem != "__main__":
                yield node.lineno, "sys.exit() in library code"


def check_handlers(file: File) -> Iterator[Finding]:
    """No bare except, and no broad one that swallows."""
    for node in ast.walk(file.tree) if file.path.suffix == ".py" else ():
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "bare except"
            elif _is_broad(node.type) and all(_is_idle(step) for step in node.body):
                yield node.lineno, "a broad except that swallows"
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith("suppress"):
            broad = [argument for argument in node.args if _is_broad(argument)]
            yield from ((argument.lineno, "a broad suppress() swallows") for argument in broad)


def check_machine_paths(file: File) -> Iterator[Finding]:
    """Nothing in the tree knows the machine it was written on."""
    for number, line in enumerate(file.lines, 1):
        found = MACHINE_PATH.search(line)
        if found:
            yield number, f"a path of a developer's machine: {found.group()}"


def check_native(file: File) -> Iterator[Finding]:
    """Only bindings* know Python, and headers state what callers must know."""
    if file.path.suffix not in NATIVE:
        return
    if not (file.path.name.startswith("bindings")):
        for number, line in enumerate(file.lines, 1):
            if re.match(r"\s*#\s*include\s*[<\"](pybind11|Python\.h|torch)", line):
                yield number, "Python outside bindings*"
            if re.search(r"\b(std::)?(exit|abort|quick_exit)\s*\(", line) and "tests" not in str(
                file.path
            ):
                yield number, "library code throws, it never exits"
    if file.path.suffix == ".h" and not file.text.startswith("//"):
        yield 1, "a header begins with what it is, its lifetime, threads and alignment"


Rule = Callable[[File], Iterator[Finding]]
RULES: list[Rule] = [
    check_floors, check_confinement, check_length, check_arguments, check_columns, check_docstring,
    check_name, check_output, check_handlers, check_machine_paths, check_native,
]  # fmt: skip


def _functions(file: File) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    if file.path.suffix == ".py":
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is_module(name: str) -> bool:
    """Whether `spotspeed.<name>` is a module rather than a name of the package itself."""
    package = ROOT / "spotspeed"
    return name in FLOORS or (package / name).is_dir() or (package / f"{name}.py").exists()


def _is_broad(node: ast.expr) -> bool:
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(_dotted(name).removeprefix("builtins.") in BROAD for name in names)


def _is_idle(step: ast.stmt) -> bool:
    """Whether a statement does nothing about an error."""
    if isinstance(step, ast.Return):
        return step.value is None or isinstance(step.value, ast.Constant)
    is_text = isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
    return is_text or isinstance(step, ast.Pass | ast.Continue | ast.Break)


@pytest.fixture(scope="module")
def files() -> list[File]:
    paths = [path for path in tree_files() if path.suffix in TEXT or path.name == "Makefile"]
    return [File(path, (ROOT / path).read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_obeys(rule: Rule, files: list[File]) -> None:
    found = [f"{file.path}:{line}: {what}" for file in files for line, what in rule(file)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


def test_no_tracked_file_is_large() -> None:
    large = [path for path in tree_files() if (ROOT / path).stat().st_size > MAX_TRACKED_BYTES]
    assert not large, f"over {MAX_TRACKED_BYTES} bytes: {', '.join(map(str, large))}"


@pytest.mark.parametrize("module", ["spotspeed", "spotspeed.agent", "spotspeed.cli"])
def test_it_starts_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'deepspeed', 'mpi4py'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"import {module} imports or fails with {done.stderr}"


LONG_BODY = "\n".join("    a = 1" for _ in range(MAX_FUNCTION_LINES))
OFFENCES: list[tuple[Rule, str, str]] = [
    (check_floors, "spotspeed/storage/local.py", "from spotspeed.codec import digest"),
    (check_floors, "spotspeed/core/cut.py", "from spotspeed import storage"),
    (check_floors, "spotspeed/errors.py", "import spotspeed.config"),
    (check_floors, "spotspeed/storage/local.py", "from ..codec import digest"),
    (check_floors, "spotspeed/attic/old.py", "import json"),
    (check_confinement, "spotspeed/agent/x.py", "import torch.distributed as dist"),
    (check_confinement, "spotspeed/agent/x.py", "from torch import distributed"),
    (check_confinement, "spotspeed/agent/x.py", "importlib.import_module('fsspec')"),
    (check_confinement, "spotspeed/core/cut.py", "from time import monotonic"),
    (check_length, "spotspeed/run.py", "\n" * (MAX_MODULE_LINES + 1)),
    (check_length, "spotspeed/run.py", f"def f() -> None:\n{LONG_BODY}"),
    (check_arguments, "spotspeed/run.py", "def f(self, a, b, c, d, *, e, f, g): ..."),
    (check_columns, "docs/x.md", "x" * (MAX_COLUMNS + 1)),
    (check_docstring, "spotspeed/run.py", "import json"),
    (check_docstring, "spotspeed/run.py", '"""Half of\na sentence."""'),
    (check_name, "spotspeed/storage/utils.py", ""),
    (check_output, "spotspeed/state/x.py", "print(1)"),
    (check_output, "spotspeed/state/x.py", "import sys\nsys.exit(1)"),
    (check_handlers, "spotspeed/run.py", "try:\n    f()\nexcept:\n    raise"),
    (check_handlers, "tests/x.py", "try:\n    f()\nexcept (OSError, Exception):\n    pass"),
    (check_handlers, "spotspeed/run.py", "with contextlib.suppress(Exception):\n    f()"),
    (check_machine_paths, "docs/x.md", "see " + "/".join(["", "work", "x"])),
    (check_native, "csrc/x.cpp", "#include <Python.h>"),
    (check_native, "csrc/x.cpp", "  exit(1);"),
    (check_native, "csrc/x.h", "#pragma once"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text"), OFFENCES, ids=lambda value: getattr(value, "__name__", "")
)
def test_an_offence_is_found(rule: Rule, path: str, text: str) -> None:
    assert list(rule(File(Path(path), text))), f"{rule.__name__} accepts {text[:60]!r} in {path}"
