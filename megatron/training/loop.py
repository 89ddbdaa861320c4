"""The training loop. All other parts of a run are hooks or callables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import Engine
from megatron.errors import TrainingError, UserError
from megatron.reliability.guard import StepDecision, StepGuard
from megatron.reliability.stop import EXIT_SAVED, EXIT_UNSAVED, Control
from megatron.training.evaluate import Evaluation
from megatron.training.garbage import settled
from megatron.training.hooks import Hook, Hooks, Run, Skip, Step
from megatron.training.intervals import every
from megatron.training.micro_batches import TimedLoader, take_micro_batches
from megatron.training.options import FitOptions
from megatron.training.state import TrainState


@dataclass(frozen=True)
class Actions:
    """Callables of the loop besides the step; the same ones on all ranks.

    Attributes:
        save: writes a checkpoint of the state and returns its folder.
        validate: evaluates on validation data; returns None when it was aborted.
        test: the same on test data.
        poll_saves: called after every step, to collect the result of a save in the background.
        finish_saves: waits for that save, before the run leaves or rewinds.
        rewind: loads the newest checkpoint into the engine and returns its training state.
    """

    save: Callable[[TrainState], Path] | None = None
    validate: Callable[[], Evaluation | None] | None = None
    test: Callable[[], Evaluation | None] | None = None
    poll_saves: Callable[[], Any] | None = None
    finish_saves: Callable[[], Any] | None = None
    rewind: Callable[[], Mapping[str, Any]] | None = None


def fit(
    engine: Engine,
    batches: Iterator[MicroBatch],
    schedule: Callable[[int], float],
    state: TrainState,
    options: FitOptions,
    actions: Actions | None = None,
    hooks: Sequence[Hook] = (),
    control: Control | None = None,
) -> Run:
    """Train until `options.train_iters` or until a stop is asked for; every rank calls this alike.

    Args:
        engine: takes the steps.
        batches: this rank's micro batches from `state.consumed_samples` on.
        schedule: steps applied so far -> learning rate of the next one.
        state: counters of the run; changed in place.
        options: how long to train and when to do what.
        actions: saves and evaluations.
        hooks: see `training/hooks.py`.
        control: signals, time limit, watchdog; without it nothing from outside ends the run.

    Returns:
        The run: `run.stop` says why it left early (None: it is finished), `run.exit_code` what the process should end with,
        `run.evaluations` holds the last results.

    Raises:
        TrainingError: more steps were skipped than the guard allows, non-finite numbers went into the weights (nothing is
            saved then), or another rank is lost.
        CheckpointError, DataError: from saving and from the data.
    """
    run = Run(engine, state, options, last_save=state.iteration or None)
    loop = _Loop(run, TimedLoader(batches), schedule, actions or Actions(), Hooks(hooks), control or Control())
    try:
        with settled(), loop.hooks.session(run):
            loop.before()
            while state.iteration < options.train_iters and run.stop is None and loop.read():
                loop.step()
                if options.save_rule.due(state.iteration):
                    loop.save()
                if every(options.eval_interval, state.iteration):
                    loop.validate()
                if every(options.exit_interval, state.iteration):
                    run.request_stop(f"exit_interval {options.exit_interval}")
            loop.after()
        loop.control.consensus.reduce_max([0])  # together: a launcher ends the others when the first leaves with a code
    except RuntimeError as error:  # a collective that broke, or a defect
        lost = loop.control.explain(error)
        loop.control.close(f"{type(error).__name__}: {error}"[:200], 1)
        if lost is not None:
            raise lost from error
        raise
    except BaseException as error:
        text = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"[:200]
        loop.control.close(text, getattr(error, "exit_code", 1))
        raise
    return run


class _Loop:
    """The phases of an iteration, so that `fit` reads as a list of them."""

    def __init__(
        self,
        run: Run,
        loader: TimedLoader,
        schedule: Callable[[int], float],
        actions: Actions,
        hooks: Hooks,
        control: Control,
    ) -> None:
        self.run, self.loader, self.schedule, self.actions, self.hooks = run, loader, schedule, actions, hooks
        self.control, self.guard = control, StepGuard(run.options.guard, bool(run.engine.extra_state().get("loss_scale")))
        self.guard.load(run.state.guard)
        run.engine.listener = control.phase
        self.micro_batches: Sequence[MicroBatch] = ()
        self.step_ids: list[int] = []
        self.skipped = False
        self.pending: StepDecision | None = None  # of the last step, until the ranks have agreed that it was skipped
        self.validated_at: int | None = None
        self.checked_at: int | None = None

    def before(self) -> None:
        """What is due before the first step: a save of step 0, a validation of the untrained model."""
        if self.run.state.iteration == 0 and self.run.options.save_rule.due(0):
            self.save()
        if self.run.options.eval_at_start and self.run.state.iteration < self.run.options.train_iters:
            self.validate()

    def after(self) -> None:
        """The end: a final validation and test of a finished run; in any case a save of what is not saved yet."""
        self.control.agree(self.skipped)
        self._settle()
        if self.run.stop is None and self.validated_at != self.run.state.iteration:
            self.validate()
        if self.run.state.iteration > 0 and self.run.last_save != self.run.state.iteration:
            self.check_weights()
            self.save()
        if self.run.stop is None and self.actions.test is not None:
            self._evaluated(self.actions.test())
        if self.actions.finish_saves is not None:
            self.control.phase("save")
            self.actions.finish_saves()
        if self.control.leaving is not None and self.run.stop is not None:
            saved = self.run.last_save == self.run.state.iteration or self.run.state.iteration == 0
            self.run.exit_code = EXIT_SAVED if saved else EXIT_UNSAVED
        self.control.phase("end")

    def read(self) -> bool:
        """Have the next step's micro batches; False when all ranks agreed to leave before it."""
        self.control.phase("data", self.run.state.iteration + 1)
        self.loader.begin_step()
        micro_batches = self.control.data(self._take, self.run.engine.mesh.rank, self.skipped)
        self._settle()
        self._heed()
        self.micro_batches = micro_batches or ()
        return micro_batches is not None and self.run.stop is None

    def _take(self) -> Sequence[MicroBatch]:
        return take_micro_batches(self.loader, self.run.engine.gradient_accumulation)

    def _heed(self) -> None:
        """Stop the run if the ranks have agreed to leave."""
        if self.control.leaving is not None:
            self.run.request_stop(self.control.leaving)

    def step(self) -> None:
        """Take one optimizer step, count it, call the hooks."""
        run, state = self.run, self.run.state
        begin, self.step_ids = time.perf_counter(), self.loader.sample_ids
        rate, run.engine.limits = self.schedule(state.applied_iterations), self.guard.limits()
        result = run.engine.train_step(self.micro_batches, rate)
        loss, norm, self.skipped = result.numbers()
        if not self.skipped:
            self._check(loss, norm)
        seconds = time.perf_counter() - begin + self.loader.wait_s
        decision = self.guard.decide(state.iteration + 1, loss, norm, self.skipped)
        state.iteration += 1
        state.skipped_iterations += int(self.skipped)
        state.consumed_samples += run.options.samples_per_step
        state.consumed_tokens += run.options.samples_per_step * run.options.seq_length
        state.guard = self.guard.state()
        self.control.settled()
        self.control.took(step_s=seconds)
        ids = tuple(self.step_ids)
        self.hooks.tell("on_step", run, Step(state.iteration, loss, norm, rate, self.skipped, seconds, self.loader.wait_s, ids))
        self.pending = decision if self.skipped else None
        if self.actions.poll_saves is not None:
            self.actions.poll_saves()

    def _check(self, loss: float, norm: float) -> None:
        """An engine that applied a step with numbers that are not finite has corrupted its weights."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self._stopped(f"the {name} is {value}", self.run.state.iteration + 1)

    def _settle(self) -> None:
        """After all ranks skipped a step: report its samples; rewind or fail when the budget is exhausted."""
        decision, self.pending = self.pending, None
        if decision is None:
            return
        run, mesh = self.run, self.run.engine.mesh
        every_rank = self.control.consensus.gather(self.step_ids)
        step = mesh.cp * mesh.tp  # context- and tensor-parallel ranks read the same samples
        if len(every_rank) < mesh.world_size:  # nobody to ask: this rank's own
            every_rank = [self.step_ids]
        own = tuple(tuple(every_rank[rank]) for rank in range(0, min(len(every_rank), mesh.dp * mesh.tp), step))
        self.hooks.tell("on_skip", run, Skip(run.state.iteration, decision.reason, own))
        if not decision.budget_exhausted:
            return
        rules, saved = run.options.guard, run.last_save
        can_rewind = rules.on_budget == "rewind" and self.actions.rewind is not None and saved is not None
        if not can_rewind or run.state.rewinds >= rules.max_rewinds:
            raise self._stopped(f"{decision.reason}; {self.guard.budget_text()}", run.state.iteration)
        self._rewind()

    def _rewind(self) -> None:
        """Restore weights and optimizer of the last checkpoint, not the data: the steps between count as skipped ones."""
        run, state = self.run, self.run.state
        assert self.actions.rewind is not None
        if self.actions.finish_saves is not None:
            self.actions.finish_saves()
        self.control.phase("rewind")
        then = TrainState.from_dict(self.actions.rewind())
        state.skipped_iterations = state.iteration - then.applied_iterations
        state.rewinds += 1
        self.guard.reset()
        state.guard, self.skipped = self.guard.state(), False
        self.hooks.tell("on_rewind", run, then.iteration)

    def _stopped(self, event: str, iteration: int) -> TrainingError:
        count = self.run.options.samples_per_step
        first = (iteration - 1) * count + self.run.state.consumed_samples - self.run.state.iteration * count
        own = ", ".join(map(str, self.step_ids[:16])) + (", ..." if len(self.step_ids) > 16 else "")
        saved = self.run.last_save
        last = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is of step {saved}"
        return TrainingError(
            f"step {iteration}: {event}",
            where=f"samples {first} to {first + count - 1} of the training data (this rank read {own or 'none'})",
            why="a learning rate that is too high, a damaged sample, or numbers outside the range of the precision",
            hint=f"nothing of this step was saved; {last}",
        )

    def save(self) -> None:
        """Save, if the run has a save folder."""
        if self.actions.save is None or not self.run.options.save_rule.enabled:
            return
        self.check_weights()
        begin = time.perf_counter()
        self.control.phase("save")
        path = self.actions.save(self.run.state)
        self.run.last_save, seconds = self.run.state.iteration, time.perf_counter() - begin
        self.control.took(save_s=seconds)
        self.hooks.tell("on_save", self.run, path, seconds)

    def check_weights(self) -> None:
        """Refuse to save, or to finish with, weights or moments that are not finite.

        Raises:
            TrainingError: on all ranks, when one of them holds such numbers.
        """
        if self.checked_at == self.run.state.iteration:
            return
        self.control.phase("save")
        bad = self.run.engine.first_not_finite()
        if any(self.control.consensus.reduce_max([int(bad is not None)])):
            place = "" if bad is None else f": {bad}"
            raise self._stopped(f"weights or optimizer state are not finite{place}", self.run.state.iteration)
        self.checked_at = self.run.state.iteration

    def validate(self) -> None:
        """Validate, if the run has validation data."""
        if self.actions.validate is None or self.run.stop is not None:
            return
        self.validated_at = self.run.state.iteration
        self._evaluated(self.actions.validate())

    def _evaluated(self, evaluation: Evaluation | None) -> None:
        self._heed()
        if evaluation is None:
            return
        state = self.run.state
        self.run.evaluations[evaluation.split] = evaluation
        if evaluation.split == "validation" and (
            state.best_validation_loss is None or evaluation.loss < state.best_validation_loss
        ):
            state.best_validation_loss, state.best_iteration = evaluation.loss, state.iteration
        self.hooks.tell("on_evaluation", self.run, evaluation)
