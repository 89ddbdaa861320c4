"""Everything worth measuring on a GPU, in one call of under nine minutes: one child process per part, one JSON line per result.

    python tools/bench/gpu_kit.py --output DIR [--minutes 9] [--only facts,operators] [--skip peers]
    python tools/bench/gpu_kit.py --output DIR --rehearse        tiny shapes in Triton's interpreter, on any CPU

The driver imports neither torch nor Triton, so nothing that a part does can take it down: a part that raises, hangs or is
killed loses the row it was at and no other. A part that died is started once more and goes on behind that row. The same
command again goes on where the last one stopped; rows that are stored are not measured again.

Parts are the modules of `tools/bench/gpu_kit_parts/`, in the order of `PARTS`; what follows a `-` is an argument. Every row is
flushed to DIR/<part>.jsonl before the next one starts. Accuracy is reported, never a gate. A machine needs torch, Triton and
numpy; the parts `peers` and `tests` also need the wheels of `make gpu-wheels`. `tools/bench/gpu_report.py DIR` makes the table
and the plot afterwards, anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# part -> seconds after which its child is ended
PARTS = {
    "facts": 40,
    "smoke": 75,
    "correctness-bf16": 90,
    "correctness-fp32": 90,
    "correctness-fp16": 90,
    "tests": 240,
    "peers": 150,
    "operators": 40,
    "kernels": 25,
    "training": 60,
    "cuts": 60,
    "decode": 30,
    "prefill": 60,
}
# Nothing in these is timed, and most of their time is compilation, which the timed parts then find in Triton's cache: they run
# side by side, and beside them processes that compile what a timed part needs.
_UNTIMED = frozenset(("smoke", "correctness-bf16", "correctness-fp32", "correctness-fp16", "tests"))
_COMPILERS = {"peers": 8, "operators": 4, "training": 2, "cuts": 6}
WARM = "GPU_KIT_WARM"
"""Environment variable of a process that compiles ahead: its number and how many there are."""
_LEAST = 10.0  # seconds: no part starts with less


@dataclass(frozen=True)
class Kit:
    """One run.

    Attributes:
        output: folder of the results.
        parts: names of the parts, in order.
        rehearse: whether it is a rehearsal on a CPU.
        end: when it must be over, by `time.monotonic`.
        package: whose `__main__` runs a part.
    """

    output: Path
    parts: Sequence[str]
    rehearse: bool
    end: float
    package: str = "tools.bench.gpu_kit_parts"

    def start(self, part: str, warm: str = "") -> subprocess.Popen[bytes]:
        """A process of its own for a part; with `warm` it only compiles."""
        command = [sys.executable, "-m", self.package, part, "--output", str(self.output)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"} | ({WARM: warm} if warm else {})
        if self.rehearse:
            command.append("--rehearse")
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (self.output / f"{part}.log").open("a") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        _running.append(child)
        return child

    def child(self, part: str, seconds: float) -> str:
        """Run a part in a process of its own; what came of it, in a few words."""
        status = finished(self.start(part), seconds)
        return f"ended after {seconds:.0f} s" if status is None else "done" if status == 0 else f"exit code {status}"

    def compilers(self, parts: Sequence[str]) -> list[subprocess.Popen[bytes]]:
        """Processes that compile ahead for the timed ones of these parts."""
        counts = {} if self.rehearse else {part: _COMPILERS[part] for part in parts if part in _COMPILERS}
        return [self.start(part, f"{i} {count}") for part, count in counts.items() for i in range(count)]

    def part(self, name: str) -> dict[str, object]:
        """Run a part, once more if it died: how it ended and how long it took."""
        begin = time.monotonic()
        outcome = "left out: no time"
        for _ in range(2):
            left = min(self.end - time.monotonic(), PARTS[name] - (time.monotonic() - begin))
            if left < _LEAST:
                break
            outcome = self.child(name, left)
            if not outcome.startswith("exit code"):
                break
        rows = stored(self.output / f"{name}.jsonl")
        failed, seconds = sum("error" in row for row in rows), round(time.monotonic() - begin, 1)
        print(f"{name}: {outcome}, {len(rows)} rows, {failed} with an error, {seconds} s", flush=True)
        return {"outcome": outcome, "seconds": seconds}

    def run(self) -> dict[str, dict[str, object]]:
        """Every part that there is time for: part -> how it ended and how long it took."""
        outcomes: dict[str, dict[str, object]] = {}
        for together, group in itertools.groupby(self.parts, key=lambda name: name in _UNTIMED):
            names = list(group)
            ahead, latest = self.compilers(self.parts) if together else [], time.monotonic() + PARTS[names[0]]
            with ThreadPoolExecutor(len(names) if together and not self.rehearse else 1) as pool:
                for name, outcome in zip(names, pool.map(self.part, names), strict=True):
                    outcomes[name] = outcome
                    (self.output / "parts.json").write_text(json.dumps(outcomes, indent=1) + "\n")
            for process in ahead:
                finished(process, max(0.0, min(latest, self.end) - time.monotonic()))
        return outcomes


_running: list[subprocess.Popen[bytes]] = []


def _end(number: int, _: object) -> None:
    """End all children, which have sessions of their own, and this process."""
    for child in _running:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    os._exit(128 + number)


def finished(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Exit status; None where it took longer and was ended with all that it started."""
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return None


def stored(path: Path) -> list[dict[str, object]]:
    """The rows of a part's file; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def chosen(only: str, skip: str) -> list[str]:
    """The parts that these two lists name, in the order of `PARTS`."""
    selected, left_out = ([name.strip() for name in names.split(",") if name.strip()] for names in (only, skip))
    for name in [*selected, *left_out]:
        if name not in PARTS:
            sys.exit(f"error: no part '{name}'\n  try: {', '.join(PARTS)}")
    parts = [name for name in PARTS if (not selected or name in selected) and name not in left_out]
    return parts or sys.exit("error: --skip leaves no part")


def claim(output: Path, kind: str) -> None:
    """Make the folder of the results, for one kind alone: rows are known by their names, which rehearsals have too."""
    marker = output / "kind"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if marker.exists() and marker.read_text() != kind:
            sys.exit(f"error: {output} has rows of a {marker.read_text()}\n  try: another folder")
        marker.write_text(kind)
    except OSError as error:
        sys.exit(f"error: cannot write to {output}\n  why: {error}")


def main() -> None:
    """Parse, run, and answer with 1 where a part did not end by itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part runs on after this")
    parser.add_argument("--only", default="", help="these parts alone, with commas between")
    parser.add_argument("--skip", default="", help="not these")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, to see that everything works")
    args = parser.parse_args()
    parts = chosen(args.only, args.skip)
    claim(args.output, "rehearsal" if args.rehearse else "measurement")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    kit = Kit(args.output, parts, args.rehearse, time.monotonic() + args.minutes * 60)
    outcomes = kit.run()
    sys.exit(0 if all(row["outcome"] == "done" for row in outcomes.values()) else 1)


if __name__ == "__main__":
    main()
