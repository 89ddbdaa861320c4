"""Metric sinks: `metrics.jsonl`, and optionally TensorBoard and Weights & Biases.

A failing sink is reported once and never stops training; its package is imported only if it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron.observe.jsonl import JsonLines


class Sink(Protocol):
    """Receives the metrics of steps; steps never decrease."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write metrics of one step, under NeoX's metric names."""

    def close(self) -> None:
        """Close the sink; no write follows."""


class TensorBoard:
    """Event files in `folder`; TensorBoard itself hides events after the step from which a run resumes.

    One point per metric and step: a validation repeats the metrics of its step, of which only the first is written.
    """

    def __init__(self, folder: str | Path, resume_from: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs the extra `tensorboard`

        self._writer = SummaryWriter(log_dir=str(folder), purge_step=resume_from + 1 if resume_from else None)
        self._iteration = -1
        self._written: set[str] = set()

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        if iteration != self._iteration:
            self._iteration, self._written = iteration, set()
        for name, value in values.items():
            if math.isfinite(value) and name not in self._written:
                self._written.add(name)
                self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


@dataclass(frozen=True)
class WandbOptions:
    """NeoX's `wandb_*` keys.

    Attributes:
        folder: folder of W&B's files.
        project: see `wandb_project`.
        group: see `wandb_group`.
        name: see `wandb_run_name`.
        team: see `wandb_team`.
        host: see `wandb_host`.
        mode: `online`, `offline` (nothing is sent, no account is needed; `wandb sync` uploads later), None: WANDB_MODE.
        config: configuration of the run.
    """

    folder: str | Path
    project: str = "neox"
    group: str | None = None
    name: str | None = None
    team: str | None = None
    host: str | None = None
    mode: Literal["online", "offline"] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class Wandb:
    """One Weights & Biases run. Its id is stored in the folder, so that a resumed training continues the same run."""

    def __init__(self, options: WandbOptions) -> None:
        import wandb  # needs the extra `wandb`

        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id.txt"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        settings = wandb.Settings(base_url=options.host) if options.host else None
        self._run = wandb.init(
            project=options.project,
            group=options.group,
            name=options.name,
            entity=options.team,
            mode=options.mode,
            dir=str(folder),
            id=run_id,
            resume="allow" if run_id else None,
            config=dict(options.config),
            settings=settings,
        )
        id_file.write_text(self._run.id, encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


@dataclass(frozen=True)
class SinkOptions:
    """The sinks of a run.

    Attributes:
        metrics_file: path of `metrics.jsonl`.
        resume_from: step from which the run resumes, 0 for a new run.
        tensorboard_dir: folder of event files; None: no TensorBoard.
        wandb: options of Weights & Biases; None: no W&B.
    """

    metrics_file: str | Path
    resume_from: int = 0
    tensorboard_dir: str | Path | None = None
    wandb: WandbOptions | None = None


class Sinks:
    """All sinks of a run, on rank 0 only.

    Args:
        sinks: name -> sink.
        report: called with the line that reports a failing sink.
    """

    def __init__(self, sinks: Mapping[str, Sink], report: Callable[[str], None] = print) -> None:
        self._sinks, self._report = dict(sinks), report
        self._reported: set[str] = set()

    @classmethod
    def open(cls, options: SinkOptions, report: Callable[[str], None] = print) -> Sinks:
        """Open the configured sinks; reports and omits a sink that cannot be opened."""
        makers: list[tuple[str, Callable[[], Sink]]] = [
            ("metrics.jsonl", lambda: JsonLines(options.metrics_file, options.resume_from))
        ]
        if options.tensorboard_dir is not None:
            folder = options.tensorboard_dir
            makers.append(("TensorBoard", lambda: TensorBoard(folder, options.resume_from)))
        if options.wandb is not None:
            wandb_options = options.wandb
            makers.append(("Weights & Biases", lambda: Wandb(wandb_options)))
        self = cls({}, report)
        for name, make in makers:
            self._guard(name, partial(self._add, name, make))
        return self

    def _add(self, name: str, make: Callable[[], Sink]) -> None:
        self._sinks[name] = make()

    def names(self) -> Sequence[str]:
        """Names of the open sinks."""
        return list(self._sinks)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write metrics of one step to every sink."""
        for name, sink in self._sinks.items():
            self._guard(name, partial(sink.write, iteration, values))

    def close(self) -> None:
        """Close every sink."""
        for name, sink in self._sinks.items():
            self._guard(name, sink.close)

    def _guard(self, name: str, action: Callable[[], Any]) -> None:
        """Run `action`; reports its failure once per sink, whatever a third-party package raises."""
        try:
            action()
        except Exception as error:
            if name not in self._reported:
                self._reported.add(name)
                hint = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
                self._report(
                    f"warning: {name} does not accept metrics ({type(error).__name__}: {error}){hint}; training continues"
                )
