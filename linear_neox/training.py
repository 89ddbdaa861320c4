"""Training in this process: `Trainer` for a few steps at a time, `train` for a whole run as the command makes it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from linear_neox.models import ConfigLike, as_run
from megatron import assemble
from megatron.checkpoint.background import Saver
from megatron.config.checks import require_data
from megatron.config.schema import RunConfig
from megatron.data.tokenizers import Tokenizer
from megatron.engine.base import Engine
from megatron.errors import ConfigError
from megatron.generation.load import filled_model
from megatron.launch.environment import RankEnvironment, read_rank_environment
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from megatron.settings import fit_options
from megatron.training.evaluate import Evaluation
from megatron.training.hooks import Hook, Run, Step
from megatron.training.loop import fit
from megatron.training.state import TrainState


class _UpTo(Hook):
    """Notes every step, and ends the call at step `last`."""

    def __init__(self, history: list[Step], last: int) -> None:
        self.history, self.last = history, last

    def on_step(self, run: Run, step: Step) -> None:
        self.history.append(step)
        if step.iteration >= self.last:
            run.request_stop(f"step {self.last}")


class Trainer:
    """A run in one process that is trained by the call: a few steps, a look, a few more.

    It is made of the parts of `train.py` and takes the same steps: same initial weights, data order, schedule and losses. It
    writes nothing unless `save` is called: no run folder, no metrics file, no checkpoint.

        trainer = Trainer("configs/metala-quickstart.yml", train_iters=100)
        trainer.train(10)
        print([step.loss for step in trainer.history])

    Args:
        config: a loaded configuration, the name of a YAML, or a mapping of keys. Where its `load` folder holds a checkpoint,
            training goes on from it, as the command does; `load=None` starts from nothing.
        hooks: objects with methods of `megatron.training.hooks.Hook`, called at the moments that page lists.
        **overrides: keys that beat the configuration, as of `load_config`.

    Attributes:
        run: the configuration.
        history: a `Step` (iteration, loss, grad_norm, learning_rate, skipped, seconds, ...) per step taken here.

    Raises:
        ConfigError: a mistake in the configuration, or one that needs several processes.
        DataError: the data are missing or were made with another tokenizer.
        CheckpointError: the checkpoint does not fit.
    """

    def __init__(self, config: ConfigLike, *, hooks: Sequence[Hook] = (), **overrides: Any) -> None:
        run = as_run(config, **overrides)
        require_data(run)
        ranks = run.parallel.pipe_stages * run.parallel.tensor_ranks
        if ranks > 1:
            raise ConfigError(
                f"the configuration needs {ranks} processes, a Trainer is one",
                hint="model_parallel_size=1, pipe_parallel_size=0, or the command: linear-neox train CONFIG",
            )
        self._parts = assemble.build(run, RankEnvironment(), lambda: None)
        resumed = assemble.restore(run, self.engine, self.config)
        self._state = TrainState.from_dict(resumed.state)
        self.run: RunConfig = self._parts.data_pipeline.build(resumed.state.get("data", {}))
        self._goes_on = assemble.continued(self.run, resumed, self._state)
        consumed = self._state.consumed_samples, self._state.consumed_tokens
        self._batches = self._parts.data_pipeline.training(self._parts.mesh, *consumed)
        close = getattr(self._batches, "close", None)  # it may read ahead on a thread, which must end before Python does
        self._end_reading = weakref.finalize(self, close) if close is not None else None
        self._hooks = list(hooks)
        self.history: list[Step] = []

    @property
    def engine(self) -> Engine:
        """What holds weights and optimizer."""
        return self._parts.engine

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self._parts.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the data."""
        return self._parts.tokenizer

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""
        return self.run.model.seq_length

    @property
    def iteration(self) -> int:
        """Steps taken so far, those of an earlier run included."""
        return self._state.iteration

    @property
    def model(self) -> LanguageModel:
        """The model with the weights of now, in evaluation mode; ask again after more steps."""
        return filled_model(self.config, self.engine.weights())

    def train(self, steps: int | None = None) -> list[Step]:
        """Take `steps` optimizer steps, or all that are left of `train_iters`; never more than are left.

        Returns:
            The steps that were taken, which are added to `history` too.

        Raises:
            TrainingError: more steps were skipped than the guard forgives.
        """
        left = self.run.training.train_iters - self.iteration
        count = left if steps is None else min(steps, left)
        begin = len(self.history)
        if count > 0:
            options = replace(fit_options(self.run), eval_interval=None, exit_interval=None)
            hooks = [*self._hooks, _UpTo(self.history, self.iteration + count)]
            fit(self.engine, self._batches, self._goes_on.schedule, self._state, options, hooks=hooks)
        return self.history[begin:]

    def evaluate(self, name: str = "valid") -> Evaluation:
        """Loss over the run's `eval_iters` batches of `valid` or `test`.

        Returns:
            `.loss` in nats per token, `.perplexity`, and `.accuracy` for tasks that have right answers.

        Raises:
            ConfigError: the run has no such data.
        """
        evaluator = assemble.build_evaluator(self.run, self._parts, name, {"valid": "validation"}.get(name, name))
        evaluation = None if evaluator is None else evaluator()
        if evaluation is None:
            raise ConfigError(
                f"the run has no data to evaluate under '{name}'", hint="set split (or valid_data_paths) and eval_iters"
            )
        return evaluation

    def save(self, folder: str | Path | None = None) -> Path:
        """Write a checkpoint: weights, optimizer, data cursor, tokenizer; `train.py` goes on from it.

        Args:
            folder: the save folder; None is the configuration's `save`.

        Returns:
            The `global_step<N>` folder, for `load_checkpoint` and `export_hf`.

        Raises:
            ConfigError: no folder is named.
            CheckpointError: it cannot be written.
        """
        folder = folder or self.run.checkpoint.save
        if folder is None:
            raise ConfigError("no folder to save to is named", hint='trainer.save("runs/mine/checkpoints"), or the key save')
        saver = Saver(background=False)
        return assemble.write_checkpoint(self.run, self._parts, saver, folder, self._state, self._goes_on.facts)

    def close(self) -> None:
        """Give back what the engine holds outside Python's memory."""
        if self._end_reading is not None:
            self._end_reading()
        self.engine.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def train(config: ConfigLike, **overrides: Any) -> Run:
    """A whole run in this process, as `train.py` makes it: run folder, metrics, evaluations, checkpoints, plot.

    Args:
        config: a loaded configuration, the name of a YAML, or a mapping of keys.
        **overrides: keys that beat the configuration, as of `load_config`.

    Returns:
        `.state.iteration`, `.stop` (why it left early, None when it is finished), `.evaluations`, `.exit_code`.

    Raises:
        UserError: any mistake in configuration, data or checkpoint; a run that cannot go on.
    """
    env = read_rank_environment()
    run = as_run(config, world_size=env.world_size, **overrides)
    require_data(run)
    return assemble.train(run, env, ("linear_neox.train", run.name))
