"""Starts a job and stays with it: signals go through, the exit code comes back, its first error is said last.

Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO

from megatron.errors import LaunchError
from megatron.launch.exports import launcher_environment
from megatron.launch.job import SUPERVISOR, Job
from megatron.launch.options import LaunchOptions, Machine
from megatron.launch.process_exit import die_with_parent
from megatron.launch.stderr_follower import FirstError

# What the codes of `megatron/reliability/stop.py` and `watchdog.py` mean; those files import torch, this one must not.
_LEFT = {
    75: "it was asked to leave (signal or time limit) and its work is saved: the same command goes on",
    76: "it was asked to leave and had no folder to save to",
    21: "a rank stood still, see the watchdog's report; the same command goes on from the last checkpoint",
    22: "a rank was lost, see the report; the same command goes on from the last checkpoint",
}
# After the first host has ended with an error, the others have so long to end by themselves (their connections break at once).
HOST_GRACE_S = 12.0
_SSH_FAILED = 255
_RANK_END = re.compile(rb"(?:\S+: )?supervisor: rank (\d+) ended with (\d+)$")


def visible_devices(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Ids of the GPUs that a process started here would see.

    They come from the device files (or `nvidia-smi` where there are none), cut down by CUDA_VISIBLE_DEVICES as CUDA does it:
    the list ends at the first entry that does not exist; entries may also be UUIDs.
    """
    env = os.environ if environ is None else environ
    present = len(glob.glob("/dev/nvidia[0-9]*"))
    if not present and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        present = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return chosen_devices(present, env.get("CUDA_VISIBLE_DEVICES"))


def chosen_devices(present: int, visible: str | None) -> tuple[str, ...]:
    """The ids that `visible` (a value of CUDA_VISIBLE_DEVICES, None if unset) leaves of `present` GPUs."""
    if visible is None:
        return tuple(str(i) for i in range(present))
    chosen: list[str] = []
    for item in (part.strip() for part in visible.split(",")):
        exists = int(item) < present if item.isdecimal() else present and item.startswith(("GPU-", "MIG-"))
        if not exists:
            break
        chosen.append(item)
    return tuple(chosen)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(visible_devices(), cores, sys.executable, socket.gethostname())


def free_port() -> int:
    """A TCP port that nobody on this machine uses now, chosen again by the kernel for each call."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rendezvous_port(options: LaunchOptions, given: bool, hosts: int) -> int:
    """The port where the ranks meet: `master_port` where the configuration gives one, else a free one.

    Ranks that one command starts are told it, over all hosts. torchrun on several hosts is started by a command on each, which
    must agree without having met: on the default.

    Args:
        given: whether the configuration gives `master_port`. hosts: of the host file, 0 without one.
    """
    several = options.num_nodes > 1 or (options.num_nodes < 0 and hosts > 1)
    return options.master_port if given or (options.runner == "torchrun" and several) else free_port()


def write_files(job: Job) -> None:
    """Write what the launcher reads (host file, exported variables) into the run folder, readable for everybody.

    Raises:
        LaunchError: the folder cannot be written.
    """
    for name, text in job.files.items():
        try:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"cannot write {name}", why=str(error), hint="run_dir: a folder that can be written") from error


def run_job(job: Job) -> tuple[int, str]:
    """Run to the end: (exit code, the job's first error, empty when nothing was heard of one).

    A job of one plain process replaces this one and does not return.

    Raises:
        LaunchError: the program cannot be started.
    """
    environment = {**os.environ, **{k: v for k, v in job.environment.items() if k not in os.environ or k.startswith("DS_ENV")}}
    write_files(job)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if job.route == "python":
            os.execve(job.command[0], list(job.command), environment)
        if job.route == "hosts":
            environment = launcher_environment(environment)
        # A session of its own: Ctrl-C in a terminal would reach the launcher too, which gives its ranks 30 s and exits with 1.
        # Its standard input is our end's sign, whatever ends us: supervisors (of ranks, or of a runner) wait for it.
        child = subprocess.Popen(
            _kept(job),
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL if job.route == "torchrun" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=None if job.route == "hosts" else die_with_parent,
        )
    except OSError as error:
        raise LaunchError(f"cannot start {job.command[0]}", why=str(error)) from error
    follower = _Follower(child, job)
    code = _wait(child, job, follower)
    return follower.finish(code)


def _kept(job: Job) -> tuple[str, ...]:
    """The command; a runner of several hosts, whose pdsh or mpirun would outlive it, below a supervisor."""
    if job.route != "hosts":
        return job.command
    # pdsh is never asked: DeepSpeed's runner would then kill every job on the hosts by name.
    option = "--group-at-once" if job.launcher == "pdsh" else "--group"
    return (job.command[0], "-SE", SUPERVISOR, option, *job.command[1:])


class _Follower:
    """Passes the job's stderr on, and ends a job of several hosts when one of them has failed."""

    def __init__(self, child: subprocess.Popen[bytes], job: Job) -> None:
        self._child, self._job, self._codes, self._ranks = child, job, list[int](), dict[int, int]()
        self._timer = threading.Timer(HOST_GRACE_S, self.end_group)
        self._timer.daemon = True
        self._first = FirstError(self._host_ended if job.launcher == "pdsh" else None)
        assert child.stderr is not None
        self._thread = threading.Thread(target=self._read, args=(child.stderr,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            if match := _RANK_END.match(line.rstrip()):
                self._ranks[int(match.group(1))] = int(match.group(2))
                continue
            with contextlib.suppress(OSError):  # nobody hears it; the job must not wait for a pipe that fills
                os.write(sys.stderr.fileno(), line)
            self._first.hear(line.decode(errors="replace").rstrip("\n"))

    def _host_ended(self, host: str, code: int) -> None:
        if code and not self._codes:
            self._timer.start()
        self._codes.append(code)

    def end_group(self) -> None:
        """Kill runner and pdsh: the ssh connections end, and the supervisors on the hosts end their ranks (`supervisor.py`)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def finish(self, code: int) -> tuple[int, str]:
        """The exit code to give back and the first error. What hosts reported beats the launcher's own end."""
        self._timer.cancel()
        self._thread.join(timeout=2.0)
        told = [c for c in self._codes if c]
        if told:
            ours = [c for c in told if c < 128]
            # A cut connection (255) is a lost rank; codes of ours say more than "ended by signal 9".
            code = ours[0] if ours else 22 if _SSH_FAILED in told else told[0]
        elif self._job.launcher == "pdsh" and not code and len(self._ranks) < self._job.processes:
            code = 22  # the launcher says that all is well, but not every rank has reported its end
        return code, self._first.text()


def _wait(child: subprocess.Popen[bytes], job: Job, follower: _Follower) -> int:
    """Wait for the launcher; its exit code, 128 + n for a signal n.

    Signals are passed on: to the ranks themselves where they are the launcher's children, since DeepSpeed's launcher would end
    them after 30 seconds and hide their exit code (75: stopped, work saved); with pdsh by ending the connections, at which the
    supervisors ask their ranks to leave (its runner would kill every DeepSpeed job on the hosts by name); else to the launcher.
    A closed terminal counts as SIGTERM.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        if job.launcher == "pdsh":
            follower.end_group()
            return
        wanted = signal.SIGTERM if number == signal.SIGHUP else number
        for pid in (children(child.pid) if job.route == "local" else ()) or (child.pid,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, wanted)

    passed = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in passed}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # DeepSpeed's launcher hands the negative number of a signal to exit(), which makes 256 - n of it.
    return 128 - code if code < 0 else 384 - code if 192 <= code < 255 else code


def children(pid: int) -> tuple[int, ...]:
    """Process ids of the direct children of `pid`; empty where there is no /proc."""
    found: list[int] = []
    for listing in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(listing, encoding="ascii") as file:
            found += [int(word) for word in file.read().split()]
    return tuple(found)


def explain_failure(job: Job, code: int) -> LaunchError:
    """The error to show when a job ended with `code`; its first error follows it on the screen."""
    if code in _LEFT:
        return LaunchError(f"the job left with exit code {code}", why=_LEFT[code], hint="docs/reliability.md lists the codes")
    why = "the first process that failed says so; the others were stopped"
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else str(code - 128)
        why = f"a process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return LaunchError(f"the job ended with exit code {code}", where=f"{job.processes} processes, {job.launcher}", why=why)
