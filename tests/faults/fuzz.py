"""Fuzz a reader: valid files are changed in many ways, and each result is read in a process of its own with limits.

    nice -n 19 .venv/bin/python -m tests.faults.fuzz READER --minutes 30 --seed 1 [--keep FOLDER] [--only NUMBER]

A case is a number: with the reader and the seed it gives the same files again. What may come of one is a result or a
`UserError`; a traceback, a signal, more than SECONDS or more than MEMORY is a finding. Findings with the same last line are
one kind; the files of its first case are kept in FOLDER. Those in `fuzz_cases/` are replayed by `test_fuzz.py`.
Prints one JSON line; exit code 1 when there were findings.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from megatron.errors import UserError
from tests.faults import fuzz_mutate
from tests.faults.fuzz_readers import READERS, Reader, offline
from tests.faults.report import store

SECONDS, MEMORY = 5, 1 << 30


def in_child(reader: Reader, root: Path) -> str:
    """Read a folder in a forked process; empty, or what went wrong in one line."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        _read(reader, root, into)
    os.close(into)
    said = b""
    while piece := os.read(out, 65536):
        said += piece
    os.close(out)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status in (-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGALRM):
        return f"more than {SECONDS} s of processor time or {SECONDS * 8} s of the clock"
    if status < 0:
        return f"signal {signal.Signals(-status).name}"
    return said.decode(errors="replace") if status else ""


def _read(reader: Reader, root: Path, into: int) -> None:
    """The child; never returns."""
    code = 0
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.alarm(SECONDS * 8)
        reader.read(root)
    except (UserError, SystemExit):
        pass
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if "megatron" in f.filename or "tests" in f.filename), frames[-1])
        line = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error!s:.200}"
        os.write(into, line.encode(errors="replace"))
        code = 1
    os._exit(code)


def make_case(reader: Reader, seeds: Path, root: Path, seed: int, number: int) -> None:
    """The files of a case."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(seeds, root)
    fuzz_mutate.folder(random.Random(f"{seed} {number}"), root, reader.resign)


def fuzz(name: str, minutes: float, seed: int, keep: Path | None = None, most: int | None = None) -> dict[str, object]:
    """Run cases for so long; what was found, by kind."""
    reader, found, number = READERS[name], dict[str, list[int]](), 0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        seeds, root = Path(folder, "seeds"), Path(folder, "case")
        seeds.mkdir()
        reader.seeds(seeds)
        shutil.copytree(seeds, root)
        reader.read(root)  # also fills what is cached for good, so that no child does it again
        begin = time.monotonic()
        while time.monotonic() - begin < minutes * 60 and (most is None or number < most):
            make_case(reader, seeds, root, seed, number)
            problem = in_child(reader, root)
            if problem:
                kind = problem.split(": ")[0]
                if kind not in found and keep is not None:
                    make_case(reader, seeds, root, seed, number)
                    shutil.copytree(root, keep / f"{name}-{seed}-{number}", symlinks=True, ignore=_special)
                    print(f"{name} case {number}: {problem}", file=sys.stderr, flush=True)
                found.setdefault(kind, []).append(number)
            number += 1
        spent = time.monotonic() - begin
    kinds = {kind: {"cases": len(cases), "first": cases[0]} for kind, cases in found.items()}
    return {"reader": name, "seed": seed, "cases": number, "minutes": round(spent / 60, 2), "findings": kinds}


def _special(folder: str, names: list[str]) -> list[str]:
    """Pipes are not copied."""
    return [name for name in names if not (os.path.isfile(f"{folder}/{name}") or os.path.isdir(f"{folder}/{name}"))]


def show(name: str, seed: int, number: int) -> None:
    """Read one case in this process, with its traceback."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        seeds, root = Path(folder, "seeds"), Path(folder, "case")
        seeds.mkdir()
        reader.seeds(seeds)
        make_case(reader, seeds, root, seed, number)
        reader.read(root)


def main() -> None:
    """Fuzz one reader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files of each kind's first case")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="read this case alone, here")
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    args = parser.parse_args()
    offline()
    if args.only is not None:
        show(args.reader, args.seed, args.only)
        return
    found = fuzz(args.reader, args.minutes, args.seed, args.keep)
    print(json.dumps(found), flush=True)
    command = " ".join(["python", "-m", "tests.faults.fuzz", *sys.argv[1:]])
    store(args.output, f"fuzz {args.reader}", command, found)
    raise SystemExit(bool(found["findings"]))


if __name__ == "__main__":
    main()
