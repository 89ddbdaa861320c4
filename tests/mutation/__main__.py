"""`python -m tests.mutation`: try every mutation of the table and write what became of it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tests.mutation.runner import copied_tree, import_slow_packages, run_tests, try_mutation
from tests.mutation.table import ROOT, Mutation, mismatches, read_table

_ENOUGH = 0.95
_OUTPUT = ROOT / "benchmarks" / "results" / "mutation.json"
_BASELINE_S = 3600.0


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Results of an earlier run by digest."""
    if not path.is_file():
        return {}
    return {row["digest"]: row for row in json.loads(path.read_text(encoding="utf-8"))["mutations"]}


def _row(mutation: Mutation, digest: str, outcome: str, seconds: float) -> dict[str, Any]:
    row = {"digest": digest, "area": mutation.area, "file": mutation.file, "old": mutation.old, "new": mutation.new}
    row |= {"tests": list(mutation.tests), "outcome": outcome, "seconds": seconds}
    return row | ({"reason": mutation.reason} if mutation.reason else {})


def _write(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file, and what stands at its head."""
    areas = sorted({row["area"] for row in rows})
    caught = [row for row in rows if row["outcome"] in ("caught", "timeout")]
    head = {
        "command": "python -m tests.mutation",
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "count": len(rows),
        "caught": len(caught),
        "share": round(len(caught) / max(1, len(rows)), 4),
        "areas": {a: [sum(r["area"] == a for r in caught), sum(r["area"] == a for r in rows)] for a in areas},
        "survivors": [f"{r['file']}: {r['old']!r} -> {r['new']!r}: {r.get('reason', '')}" for r in rows if r not in caught],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "mutations": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return head


def main(argv: list[str]) -> int:
    """0: enough are caught; 1: not, or a mutation does not match the tree any more, or the tests fail without one."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__, allow_abbrev=False)
    parser.add_argument("--area", action="append", help="only this area (repeatable)")
    parser.add_argument("--again", action="store_true", help="also those whose result stands in the output already")
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass on the tree as it is")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds for the tests of one mutation")
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    arguments = parser.parse_args(argv)
    table = read_table()
    if problems := mismatches(table):
        print("\n".join(problems), file=sys.stderr)
        return 1
    known = {} if arguments.again else _known(arguments.output)
    rows = [known[m.digest()] for m in table if m.digest() in known]
    asked = [m for m in table if m.digest() not in known and (not arguments.area or m.area in arguments.area)]
    os.environ["OMP_NUM_THREADS"] = "1"
    import_slow_packages()
    with copied_tree() as root:
        tests = sorted({test for m in asked for test in m.tests})
        if (
            tests
            and not arguments.no_baseline
            and (code := run_tests(root, tests, _BASELINE_S, root.parent / "log", write_bytecode=True)) != 0
        ):
            print(f"the tests fail without a mutation ({code}):\n{(root.parent / 'log').read_text()[-3000:]}", file=sys.stderr)
            return 1
        for number, mutation in enumerate(asked, 1):
            outcome, seconds = try_mutation(root, mutation, arguments.timeout)
            rows.append(_row(mutation, mutation.digest(root), outcome, seconds))
            print(
                f"{number}/{len(asked)} {outcome:8} {seconds:6.1f} s  {mutation.file}: {mutation.old.strip()[:70]}", flush=True
            )
            _write(arguments.output, rows)
    head = _write(arguments.output, rows)
    print(f"{head['caught']} of {head['count']} caught ({head['share']:.1%}); {arguments.output}")
    print("\n".join(head["survivors"]))
    return 0 if head["share"] >= _ENOUGH else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
