"""Runs DeepSpeed's own checkpoint tests with and without spotspeed, and tells them apart.

    python -m tests.deepspeed_suite CHECKOUT [--one-path] [--results FILE] [-- PYTEST ARGUMENT ...]

CHECKOUT is a clone of DeepSpeed's repository at the installed version (the tests are not in its
packages); its tests need the pytest of DeepSpeed's requirements-dev. By default they are those in
tests/unit/checkpoint. Exits with 1 when a test passes without spotspeed and not with it, unless it
is one of those that assert how DeepSpeed lays its files out, or what DeepSpeed cannot do.

`test_elastic_checkpoint_change_dp` is skipped with spotspeed: it expects a load on another number
of ranks to fail. Where it works, pytest's complaint ends workers of DeepSpeed's pool, and the
session hangs until DeepSpeed's own limit ends it: whoever runs the tests otherwise has to leave it
out as well.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from tests.ranks import ROOT

EXPECTED = {
    "test_save_exclude_frozen_weights": "opens DeepSpeed's own model file",
    "test_save_exclude_custom_frozen_weights": "opens DeepSpeed's own model file",
    "test_convert_zero_checkpoint_to_fp32_state_dict": "looks for the script zero_to_fp32.py",
    "test_elastic_checkpoint_change_dp": "expects that another number of ranks is refused",
    "TestUnrecordedMomentumLayoutIsRefused": "opens and changes DeepSpeed's own files",
}
"""Parts of the names of tests that cannot hold with spotspeed, and why."""


def run(checkout: Path, arguments: list[str], block: Path | None, *options: str) -> dict[str, str]:
    """The outcome of every test by its name: passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.",
                 f"--junitxml={report}", *arguments]  # fmt: skip
        if block is not None:
            words += ["-p", "tests.deepspeed_suite.plugin", f"--spotspeed={block}", *options]
        subprocess.run(words, cwd=checkout / "tests", env=environment(checkout), check=False)
        found = dict(outcomes(report)) if report.exists() else {}
        if not found:
            raise SystemExit(f"pytest ran no test: is {checkout} a clone of DeepSpeed?")
        return found


def environment(checkout: Path) -> dict[str, str]:
    """Both trees importable; on a machine without accelerators as many ranks as tests want."""
    paths = [str(checkout / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"LOCAL_SIZE": "4", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def outcomes(report: Path) -> list[tuple[str, str]]:
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        words = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}::{case.get('name')}"
        found.append((name, "skipped" if words == {"skipped"} else "failed" if words else "passed"))
    return found


def reason(name: str) -> str | None:
    """Why a test cannot hold with spotspeed; None when it must."""
    return next((why for part, why in EXPECTED.items() if part in name), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--one-path", action="store_true", help="one path for all tests")
    parser.add_argument("--results", type=Path, help="write the outcomes as JSON")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    chosen = words[split + 1 :] or ["unit/checkpoint"]
    checkout = options.checkout.resolve()
    with tempfile.TemporaryDirectory(prefix="spotspeed-suite-") as folder:
        without = run(checkout, chosen, None)
        same = ["--one-path"] if options.one_path else []
        with_block = run(checkout, chosen, Path(folder), *same)
    lost = sorted(name for name, how in without.items()
                  if how == "passed" and with_block.get(name) != "passed")  # fmt: skip
    won = sorted(name for name, how in with_block.items()
                 if how == "passed" and without.get(name) == "failed")  # fmt: skip
    say = sys.stdout.write
    say(f"DeepSpeed {importlib.metadata.version('deepspeed')}\n")
    say(f"without spotspeed: {dict(Counter(without.values()))}\n")
    say(f"with spotspeed:    {dict(Counter(with_block.values()))}\n")
    for name in lost:
        say(f"  no longer: {name} ({reason(name) or 'NOT EXPECTED'})\n")
    for name in won:
        say(f"  now:       {name}\n")
    if options.results:
        options.results.write_text(
            json.dumps({"without": without, "with": with_block}, indent=1) + "\n"
        )
    return int(any(reason(name) is None for name in lost))


if __name__ == "__main__":
    sys.exit(main())
