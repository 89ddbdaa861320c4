"""Starts the ranks of one node and ends with their code, where a cluster starts one command per node (Kubernetes, SkyPilot):

    python -m megatron.launch.node --nodes 2 --slots 8 --node 0 --address HOST --port 29500 train.py ARGS

torchrun would give its own code (1) for every end, so that nobody could tell a mistake in the configuration from a lost rank,
and would kill ranks 30 seconds after a signal, in the middle of a save. Here a signal goes to every rank and is waited for as
long as the cluster waits. When a rank fails, the others have `GRACE_S` to end by themselves. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from megatron.launch.process_exit import die_with_parent

GRACE_S = 12.0
_PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def rank_environment(slot: int, nodes: int, slots: int, node: int, address: str, port: int) -> dict[str, str]:
    """What a rank must know, in torchrun's names."""
    place = {"RANK": node * slots + slot, "LOCAL_RANK": slot, "WORLD_SIZE": nodes * slots, "LOCAL_WORLD_SIZE": slots}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def verdict(codes: Sequence[int]) -> int:
    """One code of those of all ranks, in the order of their ends: a code of ours says more than `ended by signal 9`."""
    failed = [code if code >= 0 else 128 - code for code in codes if code]
    return next((code for code in failed if code < 128), failed[0] if failed else 0)


class NodeProcesses:
    """The processes of one node. environments: of each rank, beside that of this process."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._asked: list[int] = []  # signals that come before the ranks are there must not be lost
        self._running: list[subprocess.Popen[bytes]] = []
        for number in _PASSED:
            signal.signal(number, self._pass_on)
        for own in environments:
            self._running.append(subprocess.Popen(command, env={**os.environ, **own}, preexec_fn=die_with_parent))
        for early in self._asked:
            self._send(early)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def wait(self, poll_s: float = 0.1) -> list[int]:
        """Exit codes in the order of the ends; ranks that outlive a failed one by `GRACE_S` are killed."""
        codes: list[int] = []
        deadline = float("inf")
        while self._running:
            for process in [p for p in self._running if p.poll() is not None]:
                self._running.remove(process)
                codes.append(process.returncode)
                if process.returncode and deadline == float("inf") and not self._asked:
                    deadline = time.monotonic() + GRACE_S
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(poll_s)
        return codes


def main(argv: Sequence[str]) -> int:
    """Run the node's ranks; the job's exit code as far as this node knows it."""
    parser = argparse.ArgumentParser(prog="megatron.launch.node", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job")
    parser.add_argument("--slots", type=int, default=1, help="ranks on each")
    parser.add_argument("--node", type=int, default=0, help="number of this one")
    parser.add_argument("--address", default="127.0.0.1", help="where rank 0 listens")
    parser.add_argument("--port", type=int, default=29500, help="its port")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args(argv)
    place = (asked.nodes, asked.slots, asked.node, asked.address, asked.port)
    environments = [rank_environment(slot, *place) for slot in range(asked.slots)]
    return verdict(NodeProcesses([sys.executable, "-u", asked.script, *asked.arguments], environments).wait())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
