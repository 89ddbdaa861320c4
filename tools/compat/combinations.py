"""Which versions are proved together, and by which tests: the one place that says so.

A combination is a Python, a torch, a transformers and a rule for all other packages. `make test-oldest` and `make test-newest`
run the two ends, `tools/compatibility.py --all` runs every combination of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ("requirements/requirements.txt", "requirements/requirements-test.txt")
CONSTRAINTS, OLDEST = "requirements/constraints.txt", "requirements/oldest.txt"

SUITE = (
    "tests/config",
    "tests/data/test_encode.py",
    "tests/data/test_sources.py",
    "tests/data/test_streaming.py",
    "tests/data/test_tokenizers.py",
    "tests/layers",
    "tests/model",
    "tests/observe/test_sinks.py",
    "tests/engine/test_engine_parity.py",
    "tests/engine/test_engine_single_process.py",
    "tests/checkpoint/test_roundtrip.py",
    "tests/export",
    "tests/generation",
    "tests/evaluation",
)
"""The suite's compatibility part: what other people's releases can break, from the configuration to the exported folder."""

OTHERS = {
    "exact": "requirements/constraints.txt",
    "oldest": "requirements/oldest.txt",
    "newest": "the newest release that each range admits",
}
"""Rule -> where the versions of all other packages come from; what torch and transformers forbid gives way."""


@dataclass(frozen=True)
class Combination:
    """Versions that are tested together.

    Args:
        python: such as `3.12`.
        torch: an exact release.
        transformers: an exact release.
        others: a key of `OTHERS`.
    """

    python: str
    torch: str
    transformers: str
    others: str = "exact"

    @property
    def name(self) -> str:
        """For folders and messages, such as `py3.12-torch2.13.0-transformers5.24.0-exact`."""
        return f"py{self.python}-torch{self.torch}-transformers{self.transformers}-{self.others}"


OLD_END = (
    Combination("3.10", "2.11.0", "5.16.0", "oldest"),
    Combination("3.11", "2.13.0", "5.16.0"),
    Combination("3.11", "2.13.0", "5.17.0"),
)
NEW_END = (
    Combination("3.11", "2.13.0", "5.23.0"),
    Combination("3.11", "2.13.0", "5.24.0"),
    Combination("3.13", "2.13.0", "5.24.0", "newest"),
)
BETWEEN = (
    Combination("3.10", "2.13.0", "5.20.2"),  # the last transformers for Python 3.10
    Combination("3.12", "2.11.0", "5.17.0"),
    Combination("3.12", "2.13.0", "5.24.0"),
)
ALL = (*OLD_END, *BETWEEN, *NEW_END)

CROSS = tuple(Combination("3.11", "2.13.0", version) for version in ("5.17.0", "5.23.0", "5.24.0"))
"""A folder exported under each of these is used under each of these."""
