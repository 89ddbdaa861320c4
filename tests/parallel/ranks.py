"""Run a test function on several real gloo ranks: the harness that every parallel test of the project shares.

    from tests.parallel.ranks import run_ranks

    def job(size): ...                     # at module level; runs on every rank, with the default process group up

    def test_it():
        results = run_ranks(job, 2, 16)    # one result per rank

Ranks are forked from one server process per test session (`rank_server.py`), which this process starts on first use;
pytest itself never forks and never opens a process group. A rank that fails or hangs fails the test with every rank's
log.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.parallel import rank_server

SERVER = Path(rank_server.__file__)


class RankError(AssertionError):
    """At least one rank failed; the message holds the logs."""


@functools.cache
def _link() -> socket.socket:
    """Start the server once; the socket to it."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, str(SERVER), str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()

    def stop() -> None:
        ours.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()

    atexit.register(stop)
    ours.settimeout(120)
    assert rank_server.receive(ours) == "ready"
    return ours


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 60.0,
    connect: bool = True,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Results of `function(*args, **kwargs)` on `world` ranks, in rank order; arguments and results must pickle.

    Args:
        timeout: seconds for the whole job, also the timeout of its collectives. connect: open the default process group first.
        env: more environment variables for the ranks.

    Raises:
        RankError: a rank raised, died, or did not end in time.
    """
    link = _link()
    link.settimeout(timeout + 30)
    request = {
        "file": inspect.getsourcefile(function),
        "function": function.__name__,
        "world": world,
        "args": args,
        "kwargs": kwargs,
        "timeout": timeout,
        "connect": connect,
        "env": dict(env or {}),
    }
    rank_server.send(link, request)
    answer = rank_server.receive(link)
    if answer is None:
        raise RankError("the rank server died")
    if answer["bad"]:
        parts = [f"rank {rank}: {why}\n{answer['logs'][rank]}" for rank, why in sorted(answer["bad"].items())]
        raise RankError("\n".join(parts))
    return [pickle.loads(result) for result in answer["results"]]
