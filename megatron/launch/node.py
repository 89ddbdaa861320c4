"""Starts the ranks of one node and exits with their code, where a cluster starts one command per node (Kubernetes, SkyPilot):

    python -m megatron.launch.node --nodes 2 --slots 8 --node 0 --address HOST --port 29500 train.py ARGS

torchrun exits with 1 whatever happened, which hides whether the configuration is wrong or a rank was lost, and it kills ranks
30 seconds after a signal, possibly during a save. Here every rank gets the signal and has as long as the cluster allows. When
a rank fails, the others have `GRACE_S` to exit. Imports nothing heavy.
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
    """The environment of a rank, with torchrun's names."""
    ranks = {"RANK": node * slots + slot, "LOCAL_RANK": slot, "WORLD_SIZE": nodes * slots, "LOCAL_WORLD_SIZE": slots}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def job_exit_code(codes: Sequence[int]) -> int:
    """One exit code for all ranks, given in the order of their ends: our own codes say more than `ended by signal 9`."""
    failed = [code if code >= 0 else 128 - code for code in codes if code]
    return next((code for code in failed if code < 128), failed[0] if failed else 0)


class NodeProcesses:
    """The processes of one node.

    Args:
        command: of every rank.
        environments: additions of each rank to this process's environment.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        # Signals that arrive before the ranks exist must not be lost: they are recorded here and sent later.
        self._received: list[int] = []
        self._running: list[subprocess.Popen[bytes]] = []
        for number in _PASSED:
            signal.signal(number, self._pass_on)
        for variables in environments:
            self._running.append(subprocess.Popen(command, env={**os.environ, **variables}, preexec_fn=die_with_parent))
        for early in self._received:
            self._send(early)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def wait(self, poll_s: float = 0.1) -> list[int]:
        """Wait for all ranks; ranks that outlive a failed one by `GRACE_S` are killed.

        Returns:
            Exit codes in the order of the ends.
        """
        codes: list[int] = []
        deadline = float("inf")
        while self._running:
            for process in [p for p in self._running if p.poll() is not None]:
                self._running.remove(process)
                codes.append(process.returncode)
                if process.returncode and deadline == float("inf") and not self._received:
                    deadline = time.monotonic() + GRACE_S
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
            time.sleep(poll_s)
        return codes


def main(argv: Sequence[str]) -> int:
    """Run the node's ranks; returns the job's exit code as this node sees it."""
    parser = argparse.ArgumentParser(prog="megatron.launch.node", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job")
    parser.add_argument("--slots", type=int, default=1, help="ranks on each node")
    parser.add_argument("--node", type=int, default=0, help="index of this node")
    parser.add_argument("--address", default="127.0.0.1", help="address of rank 0")
    parser.add_argument("--port", type=int, default=29500, help="port of rank 0")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    job = (options.nodes, options.slots, options.node, options.address, options.port)
    environments = [rank_environment(slot, *job) for slot in range(options.slots)]
    return job_exit_code(NodeProcesses([sys.executable, "-u", options.script, *options.arguments], environments).wait())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
