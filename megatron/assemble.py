"""The composition root: builds model, data, engine, checkpoints and hooks from a RunConfig, and trains.

Plain functions without state. It shows how the parts are connected; their behaviour is in the parts.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.background import Saver
from megatron.checkpoint.load import LoadOptions
from megatron.checkpoint.resume import Resumed, resume
from megatron.checkpoint.save import SaveOptions
from megatron.config.explain import print_config
from megatron.config.schema import RunConfig
from megatron.data.micro_batch import MicroBatch
from megatron.data.tokenizers import Tokenizer
from megatron.data_pipeline import DataPipeline
from megatron.engine.base import Engine
from megatron.engine.build import build_engine
from megatron.errors import UserError
from megatron.launch.environment import RankEnvironment, close_process_group, init_process_group
from megatron.launch.lock import FolderLock
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters, train_flops
from megatron.observe.console import Console, RunHeader
from megatron.observe.metrics import CostModel
from megatron.observe.plot import plot_metrics
from megatron.observe.runfolder import RunFolder, copy_console, create_run_folder
from megatron.observe.sinks import Sinks
from megatron.parallel.mesh import Mesh
from megatron.planning.capacity import limits
from megatron.planning.dry_run import Report, report
from megatron.reliability.consensus import Consensus
from megatron.reliability.signals import StopSignals, TimeLimit, seconds_of, signal_numbers
from megatron.reliability.stop import Control
from megatron.reliability.watchdog import Watchdog
from megatron.resume_settings import Continued, resumed, started
from megatron.settings import (
    checkpoint_facts,
    engine_settings,
    fit_options,
    model_config,
    run_shape,
    sink_options,
    tokenizer_of,
    vocabulary_rows,
)
from megatron.training.evaluate import Evaluator
from megatron.training.hooks import Hook, Run
from megatron.training.loop import Actions, fit
from megatron.training.reporting import Reporting
from megatron.training.state import TrainState


def dry_run(run: RunConfig, device_memory: float | None = None, mfu: float = 0.4) -> Report:
    """Memory, parameters and time of a run, without data and without allocating: see `planning/dry_run.py`.

    Args:
        run: the configuration.
        device_memory: GiB of a rank's device; None asks this machine.
        mfu: model FLOPs utilisation that the time is computed with.
    """
    if run.tokenizer.padded_vocab_size:
        rows, origin = run.tokenizer.padded_vocab_size, "padded_vocab_size"
    else:
        tokenizer = tokenizer_of(run)
        rows, origin = vocabulary_rows(run, tokenizer), f"{tokenizer.name} of {tokenizer.vocab_size} entries, padded"
    shape = run_shape(run, origin)
    there = limits(device_memory, run.logging.peak_theoretical_tflops, mfu, shape.world)
    return report(shape, model_config(run, rows), there)


def restore(run: RunConfig, engine: Engine, config: ModelConfig) -> Resumed:
    """Load the checkpoint that the run starts or resumes from: see `checkpoint/resume.py`."""
    c = run.checkpoint
    if c.load is None:
        return Resumed(None, {})
    return resume(
        c.load,
        engine,
        LoadOptions(
            model_config=config.to_dict(),
            load_optimizer=not c.no_load_optim,
            load_rng=not c.no_load_rng,
            finetune=c.finetune,
            verify=c.verify_checkpoint,
            in_place=True,  # the engine has nothing to lose: the run starts with these numbers or not at all
        ),
        iteration=c.iteration,
        save_dir=c.save,
    )


def continued(run: RunConfig, checkpoint: Resumed, state: TrainState) -> Continued:
    """The learning rate from here on, and what changed since the checkpoint; a schedule that contradicts it raises."""
    if not checkpoint.is_continuation:
        return started(run)
    return resumed(run, checkpoint.facts, state.applied_iterations, str(checkpoint.path))


class _Plot(Hook):
    """Draws loss.png at the end of a run from its metrics file; not after a stop signal, where time is short."""

    def __init__(self, folder: RunFolder, title: str, console: Console) -> None:
        self.folder, self.title, self.console = folder, title, console

    def on_end(self, run: Run, outcome: str) -> None:
        if not self.folder.metrics.is_file():
            return
        if run.exit_code:
            self.console.say(f"{self.folder.plot.name} is not drawn now; python tools/summary.py {self.folder.root} draws it")
            return
        try:
            self.console.say(f"plot {plot_metrics(self.folder.metrics, self.folder.plot, self.title)}")
        except UserError as error:
            self.console.say(error.what)


def reporting_hooks(
    run: RunConfig, folder: RunFolder, config: ModelConfig, mesh: Mesh, start: int, console: Console
) -> list[Hook]:
    """Metrics, console and plot; rank 0 has them, the others none."""
    sinks = Sinks.open(sink_options(run, folder, start), report=console.say)
    flops = train_flops(config, run.model.seq_length)
    cost = CostModel(flops, mesh.world_size, run.logging.peak_theoretical_tflops, run.training.checkpoint_activations)
    return [_Plot(folder, run.name, console), Reporting(sinks, console, cost, run.logging.log_interval)]


def _opening(run: RunConfig, config: ModelConfig, mesh: Mesh, folder: RunFolder, engine: Engine, start: int) -> str:
    total, inner = count_parameters(config)
    mixers = "+".join(dict.fromkeys(config.layer_types))
    tokens = run.training.train_iters * run.batch.train_batch_size * run.model.seq_length
    shape = f"{mixers} {config.num_layers} x {config.hidden_size}"
    place = f"{mesh.describe()}, {engine.describe()}"
    return RunHeader(shape, total, inner, tokens, run.training.train_iters, place, str(folder.root), start).line()


@dataclass(frozen=True)
class Parts:
    """The parts that a rank builds before the loop starts."""

    tokenizer: Tokenizer
    config: ModelConfig
    data_pipeline: DataPipeline
    mesh: Mesh
    engine: Engine


def build(run: RunConfig, env: RankEnvironment, connected: Callable[[], object]) -> Parts:
    """Model, data and engine of this rank, checked against each other.

    Args:
        run: the configuration.
        env: this rank.
        connected: called when all ranks have found each other.
    """
    tokenizer = tokenizer_of(run)
    rows = vocabulary_rows(run, tokenizer)
    config = model_config(run, rows)
    data_pipeline = DataPipeline(run, tokenizer, rows)
    data_pipeline.check()
    settings = engine_settings(run)
    init_process_group(env, run.parallel.distributed_backend, settings.timeout_s)
    connected()
    p = run.parallel
    mesh = Mesh.create(p.pipe_stages, p.tensor_ranks, env.world_size, env.rank, cp=p.context_parallel_size)
    return Parts(
        tokenizer, config, data_pipeline, mesh, build_engine(run.parallel.engine, config, mesh, settings, env.local_rank)
    )


def _control(run: RunConfig, rank: int, signals: StopSignals, limit: TimeLimit) -> Control:
    """Signals, time limit and watchdog; created at the same point on every rank."""
    consensus, timeout = Consensus.of_all_ranks(), run.reliability.hang_timeout
    return Control(consensus, signals, limit, Watchdog.open(timeout, rank, consensus) if timeout else None)


def write_checkpoint(
    run: RunConfig, parts: Parts, saver: Saver, folder: str | Path, state: TrainState, goes_on: Mapping[str, Any]
) -> Path:
    """Save `state` and the engine's state into `folder`.

    Args:
        run: the configuration.
        parts: of this rank.
        saver: writes, in the background if it is set to.
        folder: the save folder.
        state: counters of the run.
        goes_on: metadata for runs that resume from it.

    Returns:
        The checkpoint's own folder.
    """
    c, tokenizer = run.checkpoint, parts.tokenizer
    return saver.save(
        folder,
        parts.engine,
        {**state.to_dict(), "data": parts.data_pipeline.state()},
        SaveOptions(
            model_config=parts.config.to_dict(),
            config_texts=run.config_texts,
            tokenizer={path.name: path for path in tokenizer.files()},
            facts={**checkpoint_facts(run, tokenizer), **goes_on},
            keep_last=c.keep_last_n_checkpoints,
            keep=c.extra_save_iters or (),
            save_optimizer=not c.no_save_optim,
            save_rng=not c.no_save_rng,
        ),
    )


def build_evaluator(
    run: RunConfig, parts: Parts, name: str, split: str, stop_asked: Callable[[], bool] | None = None
) -> Evaluator | None:
    """The evaluation of `valid` or `test` that the run asks for, None where it has none.

    Args:
        run: the configuration.
        parts: of this rank, with the datasets built.
        name: `valid` or `test`.
        split: prefix of the metrics.
        stop_asked: called between chunks of the evaluation; true aborts it.
    """
    if parts.data_pipeline.sets.get(name) is None or not run.training.eval_iters:
        return None

    def first() -> Iterator[MicroBatch]:
        return parts.data_pipeline.evaluation(name, parts.mesh)

    return Evaluator(parts.engine, first, run.training.eval_iters, split, stop_asked=stop_asked)


def _actions(run: RunConfig, parts: Parts, saver: Saver, control: Control, goes_on: Mapping[str, Any]) -> Actions:
    """Save, evaluate and rewind, as the loop calls them; goes_on: metadata for runs that resume from a checkpoint."""
    c, engine = run.checkpoint, parts.engine

    def save(state: TrainState) -> Path:
        assert c.save is not None  # the save rule is off without it
        return write_checkpoint(run, parts, saver, c.save, state, goes_on)

    def evaluator(name: str, split: str) -> Evaluator | None:
        return build_evaluator(run, parts, name, split, control.stop_asked)

    def rewind() -> Mapping[str, Any]:
        assert c.save is not None  # a run without it has no checkpoint to go back to
        return resume(c.save, engine, LoadOptions(model_config=parts.config.to_dict(), verify=c.verify_checkpoint)).state

    return Actions(save, evaluator("valid", "validation"), evaluator("test", "test"), saver.poll, saver.wait, rewind)


def train(run: RunConfig, env: RankEnvironment, command: Sequence[str]) -> Run:
    """Train from the config's start to its end, on this rank of `env`; returns how it ended.

    Raises:
        UserError: any mistake in config, data or checkpoint, with one message.
    """
    limit = TimeLimit(seconds_of(run.reliability.time_limit))
    signals = StopSignals(signal_numbers(run.reliability.exit_signals))
    folder = RunFolder(Path(run.logging.run_dir), Path(run.logging.log_dir) if run.logging.log_dir else None)
    with ExitStack() as stack:
        stack.callback(signals.stop)
        if env.is_main:
            if save := run.checkpoint.save:  # before anything of an earlier run is touched
                lock = FolderLock.take(save, shlex.join(command), partial(print, flush=True), lambda: bool(signals.received))
                stack.callback(lock.release)
            create_run_folder(folder.root, print_config(run), command, run.logging.log_dir)
            stack.enter_context(copy_console(folder.logs))
        console = Console(None if env.is_main else stack.enter_context(open(os.devnull, "w")))
        level = os.environ.get("LOGLEVEL", "INFO") if env.is_main else "ERROR"
        logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stdout)
        for line in run.warnings:
            console.say(f"warning: {line}")
        # Until all ranks are connected a signal ends the process: a rank that waits for another cannot join the consensus.
        parts = build(run, env, signals.start)
        stack.callback(close_process_group)
        stack.callback(parts.engine.close)
        checkpoint = restore(run, parts.engine, parts.config)
        state = TrainState.from_dict(checkpoint.state)
        run = parts.data_pipeline.build(checkpoint.state.get("data", {}))
        goes_on = continued(run, checkpoint, state)
        console.say(_opening(run, parts.config, parts.mesh, folder, parts.engine, state.iteration))
        for line in goes_on.lines:
            console.say(line)
        saver = Saver(background=run.checkpoint.async_save)
        stack.callback(saver.close)
        hooks: list[Hook] = []
        if env.is_main:
            hooks = reporting_hooks(run, folder, parts.config, parts.mesh, state.iteration, console)
        batches = parts.data_pipeline.training(parts.mesh, state.consumed_samples, state.consumed_tokens)
        control = _control(run, env.rank, signals, limit)
        stack.callback(control.close)
        actions, options = _actions(run, parts, saver, control, goes_on.facts), fit_options(run)
        return fit(parts.engine, batches, goes_on.schedule, state, options, actions, hooks, control)
