"""The layout of a run folder (`FILES`), and the copies of the console in it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron.errors import ConfigError
from megatron.files import write_text

# Path below `run_dir` -> contents. Files that only some runs have say when.
FILES: Mapping[str, str] = {
    "config.yml": "The merged configuration with the origin of each value; it can be started again.",
    "config.<n>.yml": "An earlier, different configuration of the same folder.",
    "command.txt": "Every command that started or resumed the run, one per line with its time.",
    "metrics.jsonl": "One JSON object per logged step; in `log_dir` if that is set.",
    "metrics.<n>.jsonl": "Metrics of an earlier training in the same folder.",
    "loss.png": "Curves of loss, validation loss, learning rate and gradient norm; written at the end of a run.",
    "logs/<host>_stdout.txt": "Copy of the console; in `log_dir` if that is set. `_stderr.txt` is that of stderr.",
    "checkpoints/": "Checkpoints, if `save` names this folder, as the shipped configurations do.",
    "checkpoints/run.lock": "The run that holds the save folder: host, process and heartbeat.",
    "launch/": "Host file and settings of a launcher, if one was used.",
    "wandb/": "Files of Weights & Biases and the id of its run, with `use_wandb`.",
    "eval_<task>_<time>.json": "Results of eval.py, unless `eval_results_prefix` names another place.",
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Attributes:
        root: the run folder.
        log_dir: folder of metrics and console copies, if it is not the run folder.
    """

    root: Path
    log_dir: Path | None = None

    @property
    def config(self) -> Path:
        """The merged configuration."""
        return self.root / "config.yml"

    @property
    def command(self) -> Path:
        """The commands that started the run."""
        return self.root / "command.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return (self.log_dir or self.root) / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """Curves of loss, learning rate and gradient norm."""
        return self.root / "loss.png"

    @property
    def logs(self) -> Path:
        """Copies of the console."""
        return self.log_dir or self.root / "logs"


def create_run_folder(
    root: str | Path, config_text: str, command: Sequence[str], log_dir: str | Path | None = None
) -> RunFolder:
    """Create the folder (rank 0 only) and record the configuration and the command; reuses an existing folder.

    Raises:
        ConfigError: the folder cannot be created or written.
    """
    run = RunFolder(Path(root), Path(log_dir) if log_dir else None)
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        run.logs.mkdir(parents=True, exist_ok=True)
        _back_up_config(run, config_text)
        write_text(run.config, config_text)
        with open(run.command, "a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(command)}\n")
    except OSError as error:
        raise ConfigError("the run folder cannot be created", where=str(run.root), why=str(error)) from error
    return run


def _back_up_config(run: RunFolder, config_text: str) -> None:
    if not run.config.is_file() or run.config.read_bytes() == config_text.encode():
        return
    number = 1
    while (backup := run.root / f"config.{number}.yml").exists():
        number += 1
    run.config.rename(backup)


class _Tee:
    """A text stream that writes to two streams; all other attributes are those of the first."""

    def __init__(self, first: TextIO, copy: TextIO) -> None:
        self._first, self._copy = first, copy

    def write(self, text: str) -> int:
        """Write to both; a full disk of the copy does not silence the console."""
        with contextlib.suppress(OSError, ValueError):
            self._copy.write(text)
        return self._first.write(text)

    def flush(self) -> None:
        """Flush both."""
        with contextlib.suppress(OSError, ValueError):
            self._copy.flush()
        self._first.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


@contextlib.contextmanager
def copy_console(folder: str | Path) -> Iterator[None]:
    """Append stdout and stderr to `<folder>/<host>_stdout.txt` and `_stderr.txt` inside the context, as in NeoX."""
    folder, host = Path(folder), socket.gethostname()
    out, err = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copies = [_open_end(folder / f"{host}_{name}.txt") for name in ("stdout", "stderr")]
        except OSError as error:
            raise ConfigError(
                "the console cannot be copied", where=str(folder), why=str(error), hint="correct log_dir"
            ) from error
        for copy in copies:
            stack.callback(_close, copy)
        sys.stdout, sys.stderr = _Tee(out, copies[0]), _Tee(err, copies[1])  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err


def _open_end(path: Path) -> TextIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), "a", encoding="utf-8", buffering=1)


def _close(copy: TextIO) -> None:
    """Close a copy; text that a full disk refused is still buffered and fails again here."""
    with contextlib.suppress(OSError):
        copy.close()
