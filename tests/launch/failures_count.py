"""What becomes of a job of two hosts when a rank, host or link fails: seconds to the end on both, exit code, last words.

    python -m tests.launch.failures_count [--faults kill stop cut ...] [--output benchmarks/results/launch-failures.json]

Two hosts are network namespaces with real sshd (`lab.py`); the job is `deepy.py` over pdsh, one rank per host. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch.lab import TwoHosts, finish, missing, scratch_folder, start
from tests.launch.tiny_run import write_run
from tests.parallel.rank_server import free_port

HANG_S = 5
LIMIT_S = 90


def ranks(hosts: TwoHosts, name: str) -> list[int]:
    """Process ids of the training processes on a host."""
    return [
        pid
        for pid, line in hosts.pids(name).items()
        if " train.py " in line and "supervisor" not in line and "deepy" not in line
    ]


def kill(hosts: TwoHosts) -> None:
    """kill -9 of the remote rank."""
    os.kill(ranks(hosts, hosts.names[1])[0], signal.SIGKILL)


def stop(hosts: TwoHosts) -> None:
    """SIGSTOP of the remote rank: it neither answers nor ends."""
    os.kill(ranks(hosts, hosts.names[1])[0], signal.SIGSTOP)


def cut(hosts: TwoHosts) -> None:
    """The link between the hosts goes down."""
    hosts.set_link(False)


def host(hosts: TwoHosts) -> None:
    """Every process of the second host dies, sshd's connections included."""
    listener = int((hosts.folder / f"sshd_{hosts.names[1]}.pid").read_text())
    for pid in hosts.pids(hosts.names[1], sshd=True):
        if pid != listener:
            os.kill(pid, signal.SIGKILL)


def launcher(hosts: TwoHosts) -> None:
    """kill -9 of the launching command's pdsh on the first host."""
    for pid, line in hosts.pids(hosts.names[0]).items():
        if line.startswith("pdsh "):
            os.kill(pid, signal.SIGKILL)


FAULTS: dict[str, Callable[[TwoHosts], None]] = {"kill": kill, "stop": stop, "cut": cut, "host": host, "launcher": launcher}


def measure(hosts: TwoHosts, folder: Path, fault: str, early: bool = False) -> dict[str, Any]:
    """Start a run, break it, and time how it ends. early: break it before the ranks have found each other."""
    folder.mkdir(exist_ok=True)
    config, name = write_run(folder / "data", train_iters=1_000_000), f"{fault}{'-early' if early else ''}"
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts.names))
    values = {"run_dir": folder / name, "hostfile": hostfile, "pipe_parallel_size": 2, "hang_timeout": HANG_S}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "deepy.py", "train.py", str(config), *words, "--set", f"master_port={free_port()}"]
    log = folder / f"{name}.log"
    process = start([*hosts.inside(hosts.names[0]), *command], hosts.environment(), log)
    metrics, deadline = folder / name / "metrics.jsonl", time.monotonic() + 90
    while not (ranks(hosts, hosts.names[1]) if early else metrics.is_file() and metrics.stat().st_size > 2000):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    FAULTS[fault](hosts)
    begin = time.monotonic()
    code, text = finish(process, log, LIMIT_S)
    back = time.monotonic() - begin
    while any(hosts.pids(host) for host in hosts.names):
        assert time.monotonic() - begin < LIMIT_S, {host: hosts.pids(host) for host in hosts.names}
        time.sleep(0.05)
    clean = time.monotonic() - begin
    if fault == "cut":
        hosts.set_link(True)
    return {
        "fault": (FAULTS[fault].__doc__ or fault).split("\n")[0].rstrip("."),
        "when": "before the ranks have met" if early else "in training",
        "hang_timeout_s": HANG_S,
        "command_ended_s": round(back, 1),
        "no_process_left_s": round(clean, 1),
        "exit_code": code,
        "last_words": text.partition("the first error of the job:\n")[2].splitlines()[:3],
        "traceback": "Traceback" in text,
    }


def main() -> int:
    """Measure every fault; the table goes to the console and into the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", nargs="*", default=["kill", "kill-early", "stop", "cut", "host", "launcher"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/launch-failures.json"))
    arguments = parser.parse_args()
    if why := missing("ip", "sshd", "ssh", "pdsh", "unshare"):
        print(f"cannot run here: {why}")
        return 1
    rows = []
    with scratch_folder("lnx-faults-") as folder:
        hosts = TwoHosts(folder / "hosts")
        try:
            for name in arguments.faults:
                rows.append(measure(hosts, folder, name.removesuffix("-early"), name.endswith("-early")))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            hosts.close()
    facts = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "faults": rows}
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row["no_process_left_s"] > 30 or not row["exit_code"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
