"""kill -9 at random moments inside a save, on four real ranks, and a resume after each.

    python -m tests.faults.checkpoint_kill --kills 200 --mode sync [--steps 40] [--seed 1] [--output result.json]

One process imports everything once and forks four ranks per life (DeepSpeed, pipeline 2 x data 2). A life resumes from what
the one before left, compares a digest of weights, optimizer, random states and cursor with the uninterrupted run's of that
step, trains on, comparing every loss, and saves after every step. At a moment drawn uniformly over a save (one of the next
three) all ranks are killed, or one of them and the rest shortly after. So each life checks the kill before it and delivers the
next.

Counted: resumes, digests or losses that differ (mixed or wrong states), resumes older than the last save that had returned.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.report import as_typed, store
from tests.parallel.rank_server import die_with_parent, free_port

WORLD, PP = 4, 2


def say(pipe: int, *words: object) -> None:
    """One line to the parent; short enough that lines of several ranks never mix."""
    os.write(pipe, (" ".join(map(str, words)) + "\n").encode())


def live(rank: int, folder: Path, mode: str, steps: int, pipe: int) -> None:
    """A rank's life: resume, train, save after each step, until it is killed or the run is over."""
    from megatron.checkpoint.background import Saver
    from megatron.checkpoint.save import SaveOptions
    from megatron.launch.environment import init_process_group, read_rank_environment
    from tests.faults.checkpoint_run import Run, model_of

    init_process_group(read_rank_environment(os.environ), timeout_s=60)
    run = Run("deepspeed", model_of(2), pp=PP, zero_stage=1)
    saver = Saver(background=mode == "async")
    skipped = run.resume(folder)
    say(pipe, "resumed", rank, run.iteration, run.digest(), len(skipped))
    while run.iteration < steps:
        loss, norm = run.step()
        whole = saver.poll()
        if whole is not None and rank == 0:
            say(pipe, "whole", 0, whole.name.removeprefix("global_step"))
        say(pipe, "step", rank, run.iteration, loss, norm, run.digest())
        if rank == 0:
            say(pipe, "save", 0, run.iteration)
        saver.save(folder, run.engine, run.state, SaveOptions(keep_last=2, **run.options))
        if mode == "sync" and rank == 0:
            say(pipe, "whole", 0, run.iteration)
        if mode == "async":
            time.sleep(0.01)  # a step that takes longer than the tiny one, so that the writing meets one
    saver.wait()
    if rank == 0:
        say(pipe, "whole", 0, run.iteration)
    say(pipe, "end", rank, run.iteration)


def fork_life(folder: Path, mode: str, steps: int) -> tuple[list[int], int]:
    """Start four ranks; their pids and the pipe they speak into."""
    read, write = os.pipe()
    port, pids = free_port(), []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            os.close(read)
            code = 1
            try:
                log = os.open(folder.parent / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                live(rank, folder, mode, steps, write)
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    os.close(write)
    return pids, read


class Lines:
    """The lines that arrive in a pipe, with a time limit that may be moved while they are read."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.rest, self.deadline = pipe, b"", 0.0

    def until(self, deadline: float) -> Iterator[list[str]]:
        """Words of every line that arrives before the deadline or the end of all writers."""
        self.deadline = deadline
        while True:
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, self.deadline - time.monotonic()))
            if not ready:
                return
            data = os.read(self.pipe, 1 << 16)
            if not data:
                return
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                yield line.decode().split()


@dataclass
class Reference:
    """The uninterrupted run: (rank, step) -> digest; step -> loss and norm; seconds of a save."""

    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    losses: dict[int, tuple[str, str]] = field(default_factory=dict)
    save_s: float = 0.0


def record(folder: Path, mode: str, steps: int) -> Reference:
    """Run without a kill."""
    found, begun, seconds = Reference(), dict[int, float](), list[float]()
    pids, pipe = fork_life(folder, mode, steps)
    for words in Lines(pipe).until(time.monotonic() + 300):
        step = int(words[2])
        if words[0] == "resumed":
            found.digests[int(words[1]), step] = words[3]
        elif words[0] == "step":
            found.digests[int(words[1]), step] = words[5]
            found.losses[step] = (words[3], words[4])
        elif words[0] == "save":
            begun[step] = time.monotonic()
        elif words[0] == "whole":
            seconds.append(time.monotonic() - begun[step])
    reap(pids, pipe)
    if len(found.losses) != steps:
        raise SystemExit("the uninterrupted run failed:\n" + (folder.parent / "rank0.log").read_text())
    found.save_s = sorted(seconds)[int(0.9 * len(seconds))]
    return found


def reap(pids: list[int], pipe: int) -> None:
    """Wait for ranks that were killed or are at their end."""
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(pipe)


@dataclass
class Result:
    """What was counted."""

    kills: int = 0
    resumes: int = 0
    wrong: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)


class Harness:
    """Lives, one after the other, in one folder."""

    def __init__(self, base: Path, mode: str, steps: int, seed: int) -> None:
        self.base, self.mode, self.steps, self.rng, self.result = base, mode, steps, random.Random(seed), Result()
        self.reference = record(base / "uninterrupted", mode, steps)
        self.folder, self.number = base / "0", 0
        self.promised = 0  # the newest step whose save had returned before the last kill
        self.after_kill = False

    def life(self) -> None:
        """Resume, check, kill."""
        pids, pipe = fork_life(self.folder, self.mode, self.steps)
        lines, saves, nth = Lines(pipe), 0, self.rng.randint(1, 3)
        ended, resumed = 0, set[int]()
        for words in lines.until(time.monotonic() + 90):
            self._check(words, resumed)
            ended += words[0] == "end"
            saves += words[0] == "save"
            if words[0] == "save" and saves == nth:
                lines.deadline = time.monotonic() + self.rng.uniform(0, 1.1 * self.reference.save_s)
        if len(resumed) < WORLD:
            logs = [(self.base / f"rank{r}.log").read_text()[-600:] for r in range(WORLD)]
            self.result.failed.append(f"life {self.number}: {logs}")
        if ended < WORLD:
            self._kill(pids)
        for words in lines.until(time.monotonic() + 5):  # what was said before the kill
            self._check(words, resumed)
        reap(pids, pipe)
        self.after_kill = ended < WORLD
        if ended == WORLD or self.result.failed:
            self._new_folder()

    def _kill(self, pids: list[int]) -> None:
        self.result.kills += 1
        victims = list(pids)
        self.rng.shuffle(victims)
        if self.rng.random() < 0.3:  # one dies first, the rest while they notice
            os.kill(victims[0], signal.SIGKILL)
            time.sleep(self.rng.uniform(0, 0.2))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    def _new_folder(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.number += 1
        self.folder, self.promised, self.after_kill = self.base / str(self.number), 0, False

    def _check(self, words: list[str], resumed: set[int]) -> None:
        what, rank, step = words[0], int(words[1]), int(words[2])
        name = f"folder {self.number}, rank {rank}, step {step}"
        if what == "whole":
            self.promised = max(self.promised, step)
        elif what == "resumed":
            resumed.add(rank)
            if rank == 0 and self.after_kill:
                self.result.resumes += 1
                self.result.found["the step that was being saved" if step > self.promised else "the last completed"] += 1
            if step < self.promised:
                self.result.older.append(f"{name}: {self.promised} had been completed")
            if words[3] != self.reference.digests[rank, step] or words[4] != "0":
                self.result.wrong.append(f"{name}: the state differs, or something was skipped ({words[4]})")
        elif what == "step":
            same = (words[3], words[4]) == self.reference.losses[step] and words[5] == self.reference.digests[rank, step]
            if not same:
                self.result.wrong.append(f"{name}: loss or state differs after the resume")


def main() -> None:
    """Kill as often as asked, print and write what was found; exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    parser.add_argument("--steps", type=int, default=40, help="of the uninterrupted run; a life that gets there starts anew")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--direct", action="store_true", help="write past the page cache, which files of this size do not")
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    import megatron.engine.deepspeed_pipeline  # noqa: F401
    from megatron.checkpoint import safetensors_writer as tensors

    if args.direct:
        tensors._DIRECT_FROM = 1
    import tests.faults.checkpoint_run  # noqa: F401

    gc.collect()
    gc.freeze()  # garbage collections of the forked ranks pass over what was imported
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as base:
        begin = time.monotonic()
        harness = Harness(Path(base), args.mode, args.steps, args.seed)
        while harness.result.resumes < args.kills:
            harness.life()
            if len(harness.result.failed) + len(harness.result.wrong) > 20:
                break
    r = harness.result
    found = {
        "mode": args.mode,
        "kills": r.kills,
        "resumes after a kill": r.resumes,
        "wrong or mixed": len(r.wrong),
        "older than the last completed": len(r.older),
        "lives that could not resume": len(r.failed),
        "resumed from": dict(r.found),
        "seconds of a save": round(harness.reference.save_s, 3),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "details": (r.wrong + r.older + r.failed)[:5],
    }
    print(json.dumps(found, indent=1), flush=True)
    name = f"kill -9 inside a save, {args.mode}" + (", past the page cache" if args.direct else "")
    store(args.output, name, as_typed(__file__), found)
    raise SystemExit(bool(r.wrong or r.older or r.failed))


if __name__ == "__main__":
    main()
