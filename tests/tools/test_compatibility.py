"""Versions: the exact set lies in the ranges, the ends of the ranges are what was proved, the page says what the runs found."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron.errors import UserError
from tools import compatibility as tool
from tools.compat import combinations, environments, suite
from tools.compat.cross import verdict
from tools.compat.page import page, release

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RANGES = [f for f in sorted(FOLDER.glob("requirements*.txt")) if f.stem not in ("requirements-cuda", "requirements-serving")]
"""Every file of ranges but that of the optional kernels of others, which need a GPU machine to build."""


def stated(file: Path) -> list[Requirement]:
    """The requirements of one file, those of files that it includes left out."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def versions(file: Path, python: str) -> dict[str, Version]:
    """Name -> exact version for one Python on Linux."""
    here = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found = {}
    for requirement in stated(file):
        if requirement.marker is None or requirement.marker.evaluate(here):
            (pin,) = requirement.specifier
            assert pin.operator == "==", requirement
            assert requirement.name not in found, f"{requirement.name} twice for Python {python}"
            found[canonicalize_name(requirement.name)] = Version(pin.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_exact_set_lies_in_every_range(python: str) -> None:
    exact = versions(FOLDER / "constraints.txt", python)
    for file in RANGES:
        for requirement in stated(file):
            version = exact.get(canonicalize_name(requirement.name))
            assert version is not None, f"{file.name}: {requirement.name} is not in constraints.txt: make lock"
            assert requirement.specifier.contains(version), f"{file.name}: {requirement} does not admit {version}"


def test_no_pin_names_a_build_that_only_one_index_has() -> None:
    pins = [r for r in stated(FOLDER / "constraints.txt") + stated(FOLDER / "oldest.txt") if "+" in str(r.specifier)]
    assert not pins, "a local version such as 2.13.0+cpu cannot be installed from PyPI"


def test_the_old_end_runs_the_lowest_release_of_every_range() -> None:
    oldest = versions(FOLDER / "oldest.txt", "3.10")
    files = [f for f in RANGES if f.stem not in ("requirements-dev", "requirements-docs", "requirements-gpu-machine")]
    for requirement in [r for file in files for r in stated(file)]:
        low = next(Version(s.version) for s in requirement.specifier if s.operator in (">=", "=="))
        assert oldest[canonicalize_name(requirement.name)].release[: len(low.release)] == low.release, requirement


def test_every_range_of_a_user_has_both_ends_and_a_reason() -> None:
    for file in RANGES:
        if file.stem in ("requirements-dev", "requirements-gpu-machine"):
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.lstrip().startswith(("#", "-r ")):
                assert re.match(r"\S+(==|>=\S+,<)\S+\s+# \S", line), f"{file.name}: {line}"


def proved_rows() -> list[dict[str, Any]]:
    rows = json.loads(tool.RESULTS.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if "unavailable" not in row and not row["failed"]]


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_ends_of_a_range_are_what_was_proved(name: str) -> None:
    (specifier,) = [r.specifier for r in stated(FOLDER / "requirements.txt") if r.name == name]
    ends = {s.operator: Version(s.version) for s in specifier}
    proved = sorted(Version(row[name]) for row in proved_rows())
    assert proved[0].release[:2] == ends[">="].release[:2], "the lower end was not proved: make test-oldest"
    first_untested = (proved[-1].major, proved[-1].minor + 1)
    assert ends["<"].release[:2] == first_untested, "the upper end is not the release after the newest proved one"


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads(tool.RESULTS.read_text(encoding="utf-8"))
    assert tool.PAGE.read_text(encoding="utf-8") == page(results), "python tools/compatibility.py --page"


def test_every_path_of_the_compatibility_part_exists() -> None:
    assert all((ROOT / path).exists() for path in combinations.SUITE)


def test_a_page_of_failures_pairs_and_what_could_not_be_had() -> None:
    base = {"torch": "2.13.0", "others": "exact", "date": "2026-01-02", "commit": "abc"}
    good = {"passed": 5, "failed": 0, "skipped": 1, "failures": [], "seconds": 7, "versions": {"torch": "2.13.0+cpu"}}
    again = [{"passed": ["tests.export.test_use::test_y"], "date": "2026-01-03", "commit": "def"}]
    bad = {**good, "failed": 1, "failures": ["tests.export.test_use::test_x"], "again": again}
    rows = [
        {**base, "python": "3.11", "transformers": "5.9.0", **good},
        {**base, "python": "3.12", "transformers": "5.24.0", **bad},
        {**base, "python": "3.10", "transformers": "5.24.0", "unavailable": "needs Python 3.11"},
    ]
    families = {"metala": "equal", "jrt": "beams with and without cache differ"}
    pairs = [{"exported": "5.9.0", "used": "5.24.0", "families": families}]
    facts = {"prompts": 4, "tokens": 24, "python": "3.11", "torch": "2.13.0", "date": "2026-01-02", "commit": "abc"}
    text = page({"rows": rows, "cross": {"rows": pairs, "missing": {"5.25.0": "no such release"}, **facts}})
    lines = text.splitlines()
    assert [line.split(" | ")[2] for line in lines if line.startswith("| 3.")] == ["5.9.0", "5.24.0", "5.24.0"]
    assert "| 3.12 | 2.13.0 | 5.24.0 | exact | 5 | 1 | 1 | 2026-01-02 | abc |" in lines
    assert "  - failed: `tests.export.test_use::test_x`" in lines and "needs Python 3.11" in text
    assert "  - passed when run again (2026-01-03, def): `tests.export.test_use::test_y`" in lines
    assert "| exported under 5.9.0 | 1 of 2 equal |" in lines
    assert "- jrt, 5.9.0 to 5.24.0: beams with and without cache differ" in lines
    assert "- transformers 5.25.0: no such release" in lines


def test_releases_sort_as_numbers() -> None:
    assert sorted(["5.24.0", "5.9.1", "5.16.0"], key=release) == ["5.9.1", "5.16.0", "5.24.0"]


def test_counts_of_a_report(tmp_path: Path) -> None:
    cases = {"a": "", "b": "<skipped/>", "c": "<failure/>", "d": "<error/>", "e": ""}
    inner = "".join(f'<testcase classname="t" name="{name}">{child}</testcase>' for name, child in cases.items())
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>", encoding="utf-8")
    assert suite.count(tmp_path / "r.xml") == {"passed": 2, "failed": 2, "skipped": 1, "failures": ["t::c", "t::d"]}


def test_failed_tests_as_pytest_takes_them() -> None:
    assert suite.node_of("tests.tools.test_compatibility::test_x[1-a]") == "tests/tools/test_compatibility.py::test_x[1-a]"
    assert suite.node_of("tests.tools.test_compatibility.Class::test_x") == "tests/tools/test_compatibility.py"


def test_failures_that_pass_when_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def second_run(environment: Path, tests: list[str]) -> dict[str, Any]:
        asked.append(tests)
        return {"seconds": 1, "passed": 1, "failed": 1, "skipped": 0, "failures": ["tests.model.test_loss::b"]}

    monkeypatch.setattr(suite, "make_environment", lambda combination: Path("env"))
    monkeypatch.setattr(suite, "_pytest", second_run)
    failures = ["tests.model.test_loss::a", "tests.model.test_loss::b"]
    first = {"passed": 5, "failed": 2, "skipped": 0, "failures": failures}
    row = suite.run_failed_again({"python": "3.11", "torch": "2.13.0", "transformers": "5.24.0", "others": "exact", **first})
    assert asked == [["tests/model/test_loss.py::a", "tests/model/test_loss.py::b"]]
    assert (row["passed"], row["failed"], row["failures"]) == (6, 1, ["tests.model.test_loss::b"])
    assert [again["passed"] for again in row["again"]] == [["tests.model.test_loss::a"]]


def test_verdicts_of_a_pair() -> None:
    right, wrong = [[1, 2]], [[1, 3]]
    expected = {"greedy": right, "greedy without cache": right}
    found = {**expected, "beams": right, "beams without cache": right}
    assert verdict(expected, found, None) == verdict(expected, found, found) == "equal"
    assert verdict(expected, {**found, "greedy": wrong}, None) == "greedy differs from the trainer's"
    assert "without cache differs" in verdict(expected, {**found, "greedy without cache": wrong}, None)
    other = {**found, "beams without cache": wrong}
    assert verdict(expected, other, None) == "beams with and without cache differ"
    assert verdict(expected, found, other) == "beams without cache differ from the first pair's"
    growing = {"greedy": right, "greedy without cache": wrong}  # the text itself depends on the way, and so may beams
    assert verdict(growing, {**other, "greedy without cache": wrong}, None) == "equal"
    assert verdict("export: X", "not exported", None) == "export: X" and verdict(expected, "Y", None) == "use: Y"


def test_a_python_that_is_not_here_is_a_reason_and_not_an_error() -> None:
    row = suite.run_suite(combinations.Combination("2.9", "2.13.0", "5.24.0"))
    assert row["unavailable"] == "no Python 2.9 on this machine" and row["others"] == "exact"


def test_which_releases_lie_beyond_their_range() -> None:
    assert environments.beyond_its_range("transformers", "6.0.0") and environments.beyond_its_range("torch", "2.10.0")
    assert not environments.beyond_its_range("transformers", "5.17.0") and not environments.beyond_its_range("torch", "2.13.0")


def asked(**changes: Any) -> argparse.Namespace:
    none = {"oldest": False, "newest": False, "all": False, "python": None, "torch": None, "transformers": None}
    return argparse.Namespace(**{**none, "others": "exact", **changes})


def test_combinations_that_the_flags_name() -> None:
    assert tool.asked_for(asked(oldest=True, all=True)) == list(dict.fromkeys([*combinations.OLD_END, *combinations.ALL]))
    one = tool.asked_for(asked(python="3.12", torch="2.13.0", transformers="5.17.0"))
    assert [c.name for c in one] == ["py3.12-torch2.13.0-transformers5.17.0-exact"]
    with pytest.raises(UserError, match="three versions"):
        tool.asked_for(asked(python="3.12"))
