"""The table of mutations: read, and held to the tree it is about."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("mutations.yml")
ARRIVES = "tests/test_keys_arrive.py::test_a_key_that_is_set_arrives"


class NoMatch(Exception):
    """A mutation whose old text is not in its file, or more than once."""


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        area: what it is about.
        file: where it is made.
        old: text that must be there exactly once.
        new: what takes its place.
        tests: pytest's paths or node ids that must notice.
        reason: why nothing can notice it, where that is known.
    """

    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    def applied(self, root: Path = ROOT) -> str:
        """The text of the file with the mistake in it.

        Raises:
            NoMatch: the old text is not there exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise NoMatch(f"{self.file}: {self.old!r} is there {count} times")
        return text.replace(self.old, self.new)

    def digest(self, root: Path = ROOT) -> str:
        """Changes when the mutation, its file or its tests do: an older result then says nothing."""
        told = hashlib.sha256(repr(self).encode())
        for path in sorted({self.file, *(test.partition("::")[0] for test in self.tests)}):
            told.update((root / path).read_bytes() if (root / path).is_file() else path.encode())
        return told.hexdigest()[:16]


def read_table(path: Path = TABLE) -> list[Mutation]:
    """All mutations. `keys` of a row stands for the arrival of these keys (`tests/test_keys_arrive.py`)."""
    found = []
    for group in yaml.safe_load(path.read_text(encoding="utf-8")):
        for row in group["mutations"]:
            own, shared = row.get("tests", group.get("tests", "")), str(row.get("keys", ""))
            tests = (*str(own).split(), *(f"{ARRIVES}[{key}]" for key in shared.split()))
            if "keys" in row and "tests" not in row:
                tests = tests[len(str(own).split()) :]
            found.append(Mutation(group["area"], group["file"], row["old"], row["new"], tests, row.get("reason", "")))
    return found


def mismatches(mutations: Iterable[Mutation], root: Path = ROOT) -> list[str]:
    """One line for every mutation that cannot be made any more, or names a test that does not exist."""
    problems = []
    for mutation in mutations:
        try:
            mutation.applied(root)
        except (NoMatch, OSError) as error:
            problems.append(str(error))
        for test in mutation.tests:
            path, _, name = test.partition("::")
            function = name.partition("[")[0]
            if not (root / path).exists() or (function and f"def {function}(" not in (root / path).read_text("utf-8")):
                problems.append(f"{mutation.file}: there is no test {test}")
        if not mutation.tests:
            problems.append(f"{mutation.file}: {mutation.old!r} names no test")
    return problems
