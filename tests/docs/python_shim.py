"""`python`, `linear-neox` and `torchrun` on the PATH of a page's shell, forwarded to the preloaded process (preloaded.py).

tests/docs/session.py copies this file into a folder under these names, below a line that names the interpreter. It starts in
some 30 ms. A new interpreter takes its place where the folder's sources differ from those that are preloaded (a page has
added a mixer), where an option of the interpreter asks for one, and for torchrun. A launcher's ranks are copies too, each below
its supervisor. Training commands get the block's settings.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

_STARTS_NOTHING = ("--dry-run", "--print-launch", "--print-job", "--print-config", "--explain", "--help", "-h")


def with_settings(words: list[str], settings: list[str]) -> list[str]:
    """The command line, with `--set KEY=VALUE` for each setting if it trains."""
    trains = any(word.rpartition("/")[2] == "train.py" for word in words) or words[:3] == ["-m", "linear_neox", "train"]
    if not trains or any(word.partition("=")[0] in _STARTS_NOTHING for word in words):
        return words
    return [*words, *[word for setting in settings for word in ("--set", setting)]]


def _sources(root: str) -> dict[str, tuple[int, int]]:
    """Relative path -> size and time of each source file of the package."""
    sources = {}
    for folder, _, names in os.walk(os.path.join(root, "megatron")):
        for name in names:
            if name.endswith(".py"):
                facts = os.stat(path := os.path.join(folder, name))
                sources[os.path.relpath(path, root)] = (facts.st_size, facts.st_mtime_ns)
    return sources


def forward(words: list[str]) -> int:
    """Run the command in a copy of the preloaded process, on this process's streams; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["DOCS_SOCKET"])
        request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answers = connection.makefile("r")
        child = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: os.kill(child, received))
        return int(answers.readline() or 1)


def main() -> int:
    """Forward, or become a new interpreter."""
    words, settings = sys.argv[1:], json.loads(os.environ.get("DOCS_SETTINGS") or "[]")
    if words[:1] == ["-SE"] and words[1].endswith("megatron/launch/supervisor.py"):  # its rank is a copy
        sys.executable, sys.argv = sys.argv[0], words[1:]
        runpy.run_path(words[1], run_name="__main__")
    words = words[words[:1] == ["-u"] :]
    name = Path(sys.argv[0]).name
    words = {"linear-neox": ["-m", "linear_neox"], "torchrun": ["-m", "torch.distributed.run"]}.get(name, []) + words
    words = with_settings(words, settings)
    plain = bool(words) and (words[0] in ("-m", "-c", "-") or not words[0].startswith("-"))
    if name == "torchrun" or not plain or _sources(os.environ["DOCS_FOLDER"]) != _sources(os.environ["DOCS_ROOT"]):
        os.execv(sys.executable, [sys.executable, *words])
    return forward(words)


if __name__ == "__main__":
    code = main()
    if code < 0:  # ended by a signal: so does this process
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
