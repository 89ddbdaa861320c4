"""The events of a run, on one page. A hook is any object with some of these methods.

    on_start(run)                    once, before the first step; the state is loaded, nothing has run yet
    on_step(run, step)               after every step that was taken, `step` is a `Step`; weights and counters are updated
    on_skip(run, skip)               when all ranks know that a step left the weights as they were, before the next step
    on_rewind(run, iteration)        after the weights went back to the checkpoint of `iteration`
    on_save(run, path, seconds)      after a checkpoint was published
    on_evaluation(run, evaluation)   after a validation or the final test
    on_end(run, outcome)             once, also after an error: `finished`, `stopped: <reason>` or `failed: <error>`

Per iteration: step, then save if due, then validation if due, then leave if due (GPT-NeoX's order). Hooks are
called in the order of the list, and for `on_end` in reverse, so that the first to open is the last to close. A hook
may call `run.request_stop(reason)`: the loop saves and leaves after the current iteration. All ranks must call it at
the same step. Hooks run on every rank that has them; what must happen once belongs in a hook that only rank 0 is
given. An exception in a hook ends the run, except in `on_end`, where the others are still called.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.engine.base import Engine
from megatron.training.evaluate import Evaluation
from megatron.training.options import FitOptions
from megatron.training.state import TrainState

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        iteration: its number, from 1.
        loss: nats per token over the global batch.
        grad_norm: before clipping.
        learning_rate: of this step.
        skipped: the weights are unchanged.
        seconds: wall time.
        data_wait_s: of which this rank waited for batches.
        sample_ids: the samples that this rank read.
    """

    iteration: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    seconds: float
    data_wait_s: float
    sample_ids: Sequence[int]


@dataclass(frozen=True)
class Skip:
    """Why step `iteration` was skipped, and the samples of all ranks: one tuple per data-parallel rank."""

    iteration: int
    reason: str
    sample_ids: Sequence[Sequence[int]]


@dataclass
class Run:
    """A run as hooks see it.

    Attributes:
        engine: of the run.
        state: its counters.
        options: how long to train and when to do what.
        last_save: the step of the newest checkpoint, None before the first.
        stop: why the run leaves early, None while it does not.
        exit_code: of the process: 0, or the code of whoever stopped the run (`reliability/stop.py`).
        evaluations: the last result of each split.
    """

    engine: Engine
    state: TrainState
    options: FitOptions
    last_save: int | None = None
    stop: str | None = None
    exit_code: int = 0
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def request_stop(self, reason: str) -> None:
        """Save and leave after the current iteration; the first reason stays."""
        self.stop = self.stop or reason


class Hook:
    """A base with every method empty, so that a hook overrides only those it needs."""

    def on_start(self, run: Run) -> None:
        """See the module."""

    def on_step(self, run: Run, step: Step) -> None:
        """See the module."""

    def on_skip(self, run: Run, skip: Skip) -> None:
        """See the module."""

    def on_rewind(self, run: Run, iteration: int) -> None:
        """See the module."""

    def on_save(self, run: Run, path: Path, seconds: float) -> None:
        """See the module."""

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """See the module."""

    def on_end(self, run: Run, outcome: str) -> None:
        """See the module."""


class Hooks:
    """All hooks of a run, called in order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = list(hooks)

    def tell(self, moment: str, *arguments: Any) -> None:
        """Call the method `moment` of every hook."""
        for hook in self._hooks:
            getattr(hook, moment)(*arguments)

    @contextmanager
    def session(self, run: Run) -> Iterator[None]:
        """`on_start` before the body and `on_end` after it, whatever happens inside."""
        outcome = "failed: on_start"
        try:
            self.tell("on_start", run)
            yield
            outcome = f"stopped: {run.stop}" if run.stop else "finished"
        except BaseException as error:
            outcome = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            raise
        finally:
            for hook in reversed(self._hooks):
                try:
                    hook.on_end(run, outcome)
                except Exception:
                    _log.exception("a hook failed at the end of the run: %s", type(hook).__name__)
