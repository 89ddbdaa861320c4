"""A process that has imported torch and DeepSpeed once and forks ranks on request (started by `ranks.py`).

Starting four ranks from nothing takes 20 seconds, forking them takes one. This process must stay free of what does not survive
a fork: it runs no parallel torch operation and opens no process group. Usage: `rank_server.py SOCKET_FD`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib.util
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

GRACE_S = 3.0  # after a rank has failed, how long the others may take to say why they fail too


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends: no orphans, whatever happens to pytest."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def receive(link: socket.socket) -> Any:
    """One length-prefixed pickled message; None at the end."""
    head = _exactly(link, 8)
    return pickle.loads(_exactly(link, int.from_bytes(head, "little"))) if head else None


def send(link: socket.socket, message: Any) -> None:
    """Counterpart of `receive`."""
    data = pickle.dumps(message)
    link.sendall(len(data).to_bytes(8, "little") + data)


def _exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = link.recv(min(count - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return data


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def load_function(file: str, name: str) -> Any:
    """The function `name` of the Python file `file`, imported under a name of its own."""
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(f"rank_job_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def run_rank(request: dict[str, Any], rank: int, port: int, folder: Path) -> int:
    """In the child: become rank `rank`, run the job, leave its pickled result in the folder; the exit code."""
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1)
    world = request["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **request["env"])
    try:
        from megatron.launch.environment import init_process_group, read_rank_environment

        if request["connect"]:
            init_process_group(read_rank_environment(), timeout_s=request["timeout"])
        result = load_function(request["file"], request["function"])(*request["args"], **request["kwargs"])
        (folder / f"{rank}.tmp").write_bytes(pickle.dumps(result))
        os.replace(folder / f"{rank}.tmp", folder / f"{rank}.pkl")
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def wait_all(pids: dict[int, int], timeout: float) -> dict[int, str]:
    """Wait for all ranks; rank -> what went wrong. After a failure or the time limit the rest is killed."""
    bad: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank, code = pids.pop(pid), os.waitstatus_to_exitcode(status)
                if code:
                    bad[rank] = f"exit code {code}"
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if pids and time.monotonic() > deadline:
            for pid, rank in pids.items():
                bad.setdefault(rank, "killed: another rank failed" if bad else f"time limit of {timeout:.0f} s")
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.3)
            for pid in list(pids):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                pids.pop(pid)
        time.sleep(0.005)
    return bad


def serve_one(link: socket.socket, request: dict[str, Any]) -> None:
    """Run one job on `world` forked ranks and answer with their results or their logs."""
    with tempfile.TemporaryDirectory(prefix="ranks") as name:
        folder, port, pids = Path(name), free_port(), {}
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                die_with_parent()
                link.close()
                os._exit(run_rank(request, rank, port, folder))
            pids[pid] = rank
        bad = wait_all(pids, request["timeout"])
        ranks = range(request["world"])
        logs = [(folder / f"{r}.log").read_text(errors="replace") if (folder / f"{r}.log").exists() else "" for r in ranks]
        results = [] if bad else [(folder / f"{r}.pkl").read_bytes() for r in ranks]
        send(link, {"bad": bad, "logs": logs, "results": results})


def main() -> None:
    """Import the heavy packages, say hello, serve until the other end closes."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to pytest, which closes the link
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import numpy  # noqa: F401
    import pytest  # noqa: F401  # files of tests that hold jobs import it in every rank
    import torch
    import torch._dynamo  # what activation recomputation imports at its first call, a second for every rank

    torch.set_num_threads(1)
    import megatron.engine.build
    import megatron.engine.deepspeed_pipeline
    import megatron.engine.deepspeed_zero  # noqa: F401
    from megatron.registry import layer_class, layer_names
    from tests.ops.quick_interpreter import quicken

    quicken()
    for layer in layer_names():
        layer_class(layer)
    link = socket.socket(fileno=int(sys.argv[1]))
    gc.collect()
    gc.freeze()  # no rank's garbage collection walks over what was imported here, and copies its pages
    send(link, "ready")
    while (request := receive(link)) is not None:
        serve_one(link, request)


if __name__ == "__main__":
    main()
