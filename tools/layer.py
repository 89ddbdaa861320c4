"""Creates the files of a new token mixer from a working template, and checks a mixer's contract.

    python tools/layer.py new NAME      # megatron/layers/NAME.py, tests/layers/test_NAME.py, configs/NAME.yml; docs regenerated
    python tools/layer.py check NAME    # one line per check of the contract: cases, and passed, skipped or FAILED with reasons

`new` writes a working mixer (gated linear attention on `ops/scan/`), so that every change to it can be checked. `check` runs
`tests/layers/test_contract.py` and the mixer's own tests, and exits 1 if a check fails. The contract in
`megatron/layers/base.py` has twelve clauses; each check is a test, and its line begins with the number of its clause (checks
without a number are additional).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import keyword
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import ConfigError, exit_on_error
from megatron.registry import layer_info, layer_names

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).with_name("layer_templates")
TARGETS = {"mixer.py.in": "megatron/layers/{}.py", "test.py.in": "tests/layers/test_{}.py", "config.yml.in": "configs/{}.yml"}
CONTRACT = "tests/layers/test_contract.py"


def check_name(name: str, root: Path) -> None:
    """Refuse a name that is not a valid module name, or is already in use.

    Raises:
        ConfigError: names the violated rule.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in ("base", "contract"):
        raise ConfigError(f"'{name}' cannot be the name of a mixer", hint="lower case letters, digits and _, such as my_mixer")
    if name in layer_names():
        raise ConfigError(f"there is a mixer called '{name}'", where=layer_info(name).module)
    for target in TARGETS.values():
        if (root / target.format(name)).exists():
            raise ConfigError("a file is in the way", where=str(root / target.format(name)))


def write_files(name: str, root: Path) -> list[Path]:
    """Write a mixer, its test and its YAML; see `check_name` for invalid names."""
    check_name(name, root)
    words = name.split("_")
    values = {"name": name, "class_name": "".join(map(str.capitalize, words)) + "Mixer", "title": " ".join(words).capitalize()}
    written = []
    for template, target in TARGETS.items():
        path = root / target.format(name)
        path.write_text(Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
        written.append(path)
    return written


@dataclass
class Check:
    """One check of the contract on one mixer, a test: numbers of passed and skipped cases, and the failures."""

    text: str
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """passed, skipped or FAILED."""
        return "FAILED" if self.failures else "passed" if self.passed else "skipped"


class Recorder:
    """A pytest plugin: selects the tests of one mixer and records their outcomes."""

    def __init__(self, names: Iterable[str], own: str) -> None:
        self.names, self.own = set(names), own
        self.checks: dict[str, Check] = {}
        self.broken: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Deselect the other mixers' cases."""
        items[:] = [item for item in items if self._is_ours(item)]
        for item in items:
            text = (item.function.__doc__ or item.originalname.removeprefix("test_").replace("_", " ")).strip().splitlines()[0]
            label = text if item.path.name == Path(CONTRACT).name else f"{self.own}: {text}"
            self.checks.setdefault(item.nodeid.partition("[")[0], Check(label))

    def _is_ours(self, item: Any) -> bool:
        if item.path.name != Path(CONTRACT).name:
            return True
        parameters = getattr(item, "callspec", None)
        parameters_of_case = {} if parameters is None else parameters.params
        return parameters_of_case.get("layer", parameters_of_case.get("name")) in self.names

    def pytest_collectreport(self, report: Any) -> None:
        """Record a file that cannot be imported."""
        if report.failed:
            self.broken.append(report.longreprtext.strip().splitlines()[-1])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record one phase of one case."""
        current = self.checks[report.nodeid.partition("[")[0]]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else report.longreprtext.strip().splitlines()[-1]
            case = report.nodeid.partition("[")[2].removesuffix("]")
            current.failures.append(f"[{case}] {message.splitlines()[0]}" if case else message.splitlines()[0])
        elif report.skipped:
            current.skipped += 1
        elif report.when == "call":
            current.passed += 1


def check(name: str) -> Recorder:
    """Run the contract's checks and the mixer's own tests.

    Raises:
        ConfigError: there is no such mixer.
    """
    import pytest

    info = layer_info(name)
    stem = info.module.rpartition(".")[2]
    own = ROOT / "tests" / "layers" / f"test_{stem}.py"
    recorder = Recorder([name], own.name)
    paths = [str(ROOT / CONTRACT), *([str(own)] if own.exists() else [])]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main([*paths, "-p", "no:cacheprovider", f"--rootdir={ROOT}"], plugins=[recorder])
    return recorder


def table(recorder: Recorder) -> str:
    """One line per check, followed by its failures."""
    lines = [f"cannot be tested: {message}" for message in recorder.broken]
    checks = list(recorder.checks.values())
    width = max((len(one.text) for one in checks), default=0)
    for one in checks:
        cases = one.passed + one.skipped + len(one.failures)
        lines.append(f"{one.text.ljust(width)}  {cases:3d}  {one.verdict}")
        lines += [f"    {failure}" for failure in one.failures]
    failed = sum(bool(one.failures) for one in checks)
    lines.append(f"\n{len(checks) - failed} of {len(checks)} checks without failures")
    return "\n".join(lines)


def run_new(name: str) -> int:
    """Write the files and update the generated documentation."""
    for path in write_files(name, ROOT):
        print(f"wrote {path.relative_to(ROOT)}")
    for words in (["-m", "megatron.config.explain"], ["tools/reference_pages.py", "keys", "api"]):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    print(f"\nnext: python tools/layer.py check {name}")
    return 0


def run_check(name: str) -> int:
    """Print the table; returns 1 if a check fails or nothing could be tested."""
    recorder = check(name)
    print(table(recorder))
    return int(bool(recorder.broken) or not recorder.checks or any(c.failures for c in recorder.checks.values()))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("new", "write a mixer, its test and its YAML"), ("check", "check the contract on a mixer")):
        commands.add_parser(command, help=text).add_argument("name")
    with exit_on_error():
        args = parser.parse_args(arguments)
        return run_new(args.name) if args.command == "new" else run_check(args.name)


if __name__ == "__main__":
    sys.exit(main())
