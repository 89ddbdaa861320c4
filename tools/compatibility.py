"""Proves what goes together: the suite's compatibility part under other Pythons, torches and releases of transformers.

    python tools/compatibility.py --oldest                 # make test-oldest: the lower ends of the ranges
    python tools/compatibility.py --newest                 # make test-newest: the upper ends
    python tools/compatibility.py --python 3.12 --torch 2.13.0 --transformers 5.17.0
    python tools/compatibility.py --all --cross            # every row of docs/compatibility.md, and folders between releases

Each combination gets an environment of its own under .venvs/ (uv makes it; `--remove` deletes it afterwards). Results go to
benchmarks/results/compatibility.json and docs/compatibility.md, one row per combination, the newest run of each. A combination
that this machine cannot have is listed with the reason. The exit code is 1 when a test or a pair failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import UserError, exit_on_error
from megatron.files import write_json, write_text
from tools.compat.combinations import ALL, CROSS, NEW_END, OLD_END, OTHERS, ROOT, SUITE, Combination
from tools.compat.cross import run_cross
from tools.compat.environments import remove_environment
from tools.compat.page import page
from tools.compat.suite import run_failed_again, run_suite

RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
KEY = ("python", "torch", "transformers", "others")


def asked_for(arguments: argparse.Namespace) -> list[Combination]:
    """The combinations that the flags name, each once.

    Raises:
        UserError: one of --python, --torch, --transformers without the others.
    """
    chosen = [*(OLD_END if arguments.oldest else ()), *(NEW_END if arguments.newest else ()), *(ALL if arguments.all else ())]
    single = (arguments.python, arguments.torch, arguments.transformers)
    if any(single):
        if not all(single):
            raise UserError("a combination has three versions", hint="give --python, --torch and --transformers together")
        chosen.append(Combination(*single, arguments.others))
    return list(dict.fromkeys(chosen))


def read_results() -> dict[str, Any]:
    """What earlier runs found."""
    empty: dict[str, Any] = {"rows": [], "cross": None}
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else empty


def write_results(results: dict[str, Any]) -> None:
    """Both files; after every combination, so that a run that is stopped keeps what it has."""
    write_json(RESULTS, results)
    write_text(PAGE, page(results))


def record(row: dict[str, Any]) -> None:
    """Put a row in the place of the one of the same combination; what another run wrote in the meantime stays."""
    results = read_results()
    others = [old for old in results["rows"] if any(old[key] != row[key] for key in KEY)]
    write_results({**results, "rows": [*others, row]})


def run_combinations(combinations: Sequence[Combination], remove: bool, tests: Sequence[str]) -> bool:
    """Run and record each combination; returns whether none failed."""
    good = True
    for combination in combinations:
        print(f"--- {combination.name}", flush=True)
        row = run_suite(combination, tests)
        if remove:
            remove_environment(combination)
        said = row.get("unavailable") or f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
        print(f"{combination.name}: {said}", flush=True)
        good = good and not row.get("failed")
        if tuple(tests) == SUITE:
            record(row)
    return good


def run_failures_again() -> bool:
    """Run and record the failed tests of every row once more; returns whether none is left."""
    for row in read_results()["rows"]:
        if row.get("failed") and row["passed"]:
            record(run_failed_again(row))
    return not any(row.get("failed") for row in read_results()["rows"])


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oldest", action="store_true", help="the lower ends")
    parser.add_argument("--newest", action="store_true", help="the upper ends")
    parser.add_argument("--all", action="store_true", help="every combination of the page")
    parser.add_argument("--python", help="one combination: its Python, such as 3.12")
    parser.add_argument("--torch", help="one combination: its torch, such as 2.13.0")
    parser.add_argument("--transformers", help="one combination: its transformers, also one beyond the range")
    parser.add_argument("--others", choices=sorted(OTHERS), default="exact", help="one combination: all other packages")
    parser.add_argument("--cross", action="store_true", help="folders exported under one transformers, used under another")
    parser.add_argument("--failed-again", action="store_true", help="run the failed tests of every row once more")
    parser.add_argument("--tests", nargs="+", default=list(SUITE), help="other tests; their counts are not recorded")
    parser.add_argument("--remove", action="store_true", help="delete each environment afterwards")
    parser.add_argument("--page", action="store_true", help="only write docs/compatibility.md again from the results")
    arguments = parser.parse_args()
    combinations = asked_for(arguments)
    if not (combinations or arguments.cross or arguments.page or arguments.failed_again):
        hint = "--oldest, --newest, --all, --cross, --failed-again, --page or one combination; see --help"
        raise UserError("nothing was asked for", hint=hint)
    good = run_combinations(combinations, arguments.remove, arguments.tests)
    if arguments.failed_again:
        good = run_failures_again() and good
    if arguments.cross:
        from tools.compat.families import FAMILIES, NEW_TOKENS, PROMPTS

        cross = run_cross(CROSS, list(FAMILIES), PROMPTS, NEW_TOKENS)
        write_results({**read_results(), "cross": cross})
        good = good and not cross["missing"] and all(set(row["families"].values()) == {"equal"} for row in cross["rows"])
    write_results(read_results())
    return 0 if good else 1


if __name__ == "__main__":
    with exit_on_error():
        sys.exit(main())
