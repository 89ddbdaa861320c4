"""Runs the compatibility part of the test suite in a combination's environment and counts what came of it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tools.compat.combinations import ROOT, SUITE, Combination
from tools.compat.environments import NotAvailable, installed, make_environment, python_of

SHOWN = ("numpy", "tokenizers", "huggingface-hub", "safetensors", "pydantic", "datasets", "peft", "accelerate", "lm-eval")
"""Packages whose versions the page shows in addition to torch and transformers."""


def count(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit report, and the names of those that failed.

    Args:
        report: what `pytest --junit-xml` wrote.

    Returns:
        `passed`, `failed`, `skipped`: numbers of tests; an error in a fixture or file is a failure. `failures`: their names.
    """
    numbers, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        numbers[outcome] += 1
        if outcome == "failed":
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    return {**numbers, "failures": sorted(failures)}


def describe(combination: Combination) -> dict[str, Any]:
    """What a row of the results says about its combination, the day and the code."""
    return {
        "python": combination.python,
        "torch": combination.torch,
        "transformers": combination.transformers,
        "others": combination.others,
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the tree, followed by `+` if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "megatron", "tests", "requirements")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def environment_of_tests() -> Mapping[str, str]:
    """Environment variables of every process of a combination: one thread, no hub, nothing of this interpreter's own paths."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    return {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _pytest(environment: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Counts and seconds of one run of pytest in an environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [python_of(environment), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *tests]
        start = time.monotonic()
        done = subprocess.run(words, cwd=ROOT, env=environment_of_tests(), check=False)
        seconds = round(time.monotonic() - start)
        if not report.is_file():
            return {
                "seconds": seconds,
                "passed": 0,
                "failed": 1,
                "skipped": 0,
                "failures": [f"pytest ended with {done.returncode}"],
            }
        return {"seconds": seconds, **count(report)}


def run_suite(combination: Combination, tests: Sequence[str] = SUITE) -> dict[str, Any]:
    """One row of the results: the combination, its counts, or the reason why it could not be had.

    Args:
        combination: what to test.
        tests: paths that pytest takes.

    Returns:
        `describe`'s entries with `versions`, `seconds` and `count`'s entries; or with `unavailable`, a sentence.
    """
    row = describe(combination)
    try:
        environment = make_environment(combination)
    except NotAvailable as error:
        return {**row, "unavailable": str(error)}
    versions = installed(environment)
    row["versions"] = {name: versions[name] for name in ("torch", "transformers", *SHOWN) if name in versions}
    return {**row, **_pytest(environment, tests)}


def node_of(failure: str) -> str:
    """A test of a report as pytest takes it: `tests.export.test_use::test_x[1]` is `tests/export/test_use.py::test_x[1]`.

    A test in a class and a file that could not be imported are given as their file.
    """
    module, _, name = failure.partition("::")
    path = module.replace(".", "/") + ".py"
    while not (ROOT / path).is_file() and "/" in path:
        path, name = path.rpartition("/")[0] + ".py", ""
    return f"{path}::{name}" if name else path


def run_failed_again(row: Mapping[str, Any]) -> dict[str, Any]:
    """Run the failed tests of a row once more in the same environment, such as those that a busy machine timed out.

    Args:
        row: what `run_suite` gave, with failures.

    Returns:
        The row with its counts corrected; `again` says which tests passed only then, on what day and with which commit.
    """
    combination = Combination(row["python"], row["torch"], row["transformers"], row["others"])
    second = _pytest(make_environment(combination), [node_of(name) for name in row["failures"]])
    passed = sorted(set(row["failures"]) - set(second["failures"])) if second["passed"] else []
    again = {"passed": passed, "date": date.today().isoformat(), "commit": commit()}
    failed = [name for name in row["failures"] if name not in passed]
    counts = {"passed": row["passed"] + len(passed), "failed": len(failed), "failures": failed}
    return {**row, **counts, "again": [*row.get("again", ()), again]}
