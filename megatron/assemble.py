"""The one place that knows all parts: a RunConfig becomes a model, data, an engine, checkpoints and hooks, and is trained.

It has no state and is no object. Read it to see how the parts meet; look for behaviour in the parts.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.load import load_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.config.explain import print_config
from megatron.config.schema import RunConfig
from megatron.data.batches import Batch, Batches
from megatron.data.datasets import Dataset
from megatron.data.order import sample_counts
from megatron.data.sources import dataset_from_list, datasets_from_split
from megatron.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size
from megatron.engine.base import Engine, EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.schedule import ScheduleConfig, decay_horizon, learning_rate
from megatron.errors import ConfigError, DataError
from megatron.launch.environment import RankEnvironment, close_process_group, init_process_group
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters, train_flops
from megatron.observe.console import Console, Opening
from megatron.observe.metrics import CostModel
from megatron.observe.plot import plot_metrics
from megatron.observe.runfolder import RunFolder, copy_console, create_run_folder
from megatron.observe.sinks import SinkOptions, Sinks, WandbOptions
from megatron.parallel.mesh import Mesh
from megatron.training.cadence import SaveRule
from megatron.training.evaluate import Evaluator
from megatron.training.hooks import Hook, Run
from megatron.training.loop import Actions, fit
from megatron.training.options import FitOptions
from megatron.training.reporting import Reporting
from megatron.training.state import TrainState


def tokenizer_of(run: RunConfig) -> Tokenizer:
    """The tokenizer that the config names."""
    return build_tokenizer(run.tokenizer.tokenizer_type, run.tokenizer.vocab_file, run.tokenizer.merge_file)


def vocabulary_rows(run: RunConfig, tokenizer: Tokenizer) -> int:
    """Rows of the embedding: `padded_vocab_size` where it is set, else the tokenizer's size, padded."""
    asked = run.tokenizer.padded_vocab_size
    if asked is None:
        return padded_vocab_size(tokenizer.vocab_size, run.model.make_vocab_size_divisible_by, run.parallel.tensor_ranks)
    if asked < tokenizer.vocab_size:
        raise ConfigError(
            f"padded_vocab_size {asked} is smaller than the tokenizer's {tokenizer.vocab_size} entries",
            where=run.provenance.get("padded_vocab_size"),
            hint="leave it out and it follows the tokenizer",
        )
    return asked


def model_config(run: RunConfig, rows: int) -> ModelConfig:
    """The model's mathematics out of the run's sections. rows: of the embedding, padding included."""
    m = run.model
    return ModelConfig(
        vocab_size=rows,
        hidden_size=m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_attention_heads,
        mlp_width=m.mlp_width,
        layer_types=tuple(m.layer_types),
        layer_options=json.loads(json.dumps(run.layers)),
        norm=m.norm,
        norm_eps=m.norm_eps,
        mlp="gated" if m.mlp_gated else "plain",
        activation=m.mlp_activation,
        mlp_bias=m.use_bias_in_mlp,
        tie_embeddings=not m.no_weight_tying,
        embedding_scale=m.embedding_scale,
        hidden_dropout=m.hidden_dropout,
        init_method=m.init_method,
        output_init_method=m.output_layer_init_method,
        init_std=m.init_method_std,
    )


def engine_settings(run: RunConfig) -> EngineSettings:
    """What the engine is told."""
    training, optimizer, batch = run.training, run.optimizer, run.batch
    return EngineSettings(
        seed=training.seed,
        dtype=run.precision.dtype,
        micro_batch=batch.train_micro_batch_size_per_gpu,
        gradient_accumulation=batch.gradient_accumulation_steps,
        seq_length=run.model.seq_length,
        optimizer_type=optimizer.optimizer_type,
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        gradient_clipping=optimizer.gradient_clipping,
        zero_stage=run.parallel.zero_stage,
        activation_checkpoint_interval=training.checkpoint_num_layers if training.checkpoint_activations else 0,
        fp32_grad_accum=run.precision.grad_accum_dtype == "fp32",
        fp32_allreduce=optimizer.fp32_allreduce,
        fp16=dict(run.precision.fp16 or {}),
        kernel_backend=training.kernel_backend,
        partition_method=run.parallel.pipe_partition_method,
    )


def datasets(run: RunConfig, rows: int) -> dict[str, Dataset | None]:
    """train, valid and test of the run; a token id beyond `rows` is an error when it is met."""
    data, length, seed = run.data, run.model.seq_length, run.training.seed
    t = run.training
    counts = sample_counts(t.train_iters, t.eval_interval, t.eval_iters, run.batch.train_batch_size)
    if data.data_path is not None:
        return datasets_from_split(data.data_path, data.split, length, counts, seed, data.pack_impl, rows)
    if data.train_data_paths is None:
        raise DataError(
            "no training data is named",
            hint="set data_path, or make some: python prepare_data.py pystdlib prints the lines to use",
        )
    built: dict[str, Dataset | None] = {}
    for name in ("train", "valid", "test"):
        paths, weights = getattr(data, f"{name}_data_paths"), getattr(data, f"{name}_data_weights")
        have = bool(paths) and counts[name] > 0
        built[name] = dataset_from_list(paths, weights, name, length, counts[name], seed, data.pack_impl, rows) if have else None
    return built


def open_batches(run: RunConfig, dataset: Dataset, mesh: Mesh, tokenizer: Tokenizer, start: int) -> Batches:
    """This rank's micro batches from global sample `start` on."""
    t = run.training
    return Batches(
        dataset,
        run.batch.train_micro_batch_size_per_gpu,
        mesh.dp_rank,
        mesh.dp,
        run.batch.gradient_accumulation_steps,
        start_sample=start,
        eod_token=tokenizer.eod if t.eod_mask_loss or t.reset_state_at_eod else None,
        eod_mask_loss=t.eod_mask_loss,
        reset_state_at_eod=t.reset_state_at_eod,
        num_workers=run.data.num_workers,
    )


def fit_options(run: RunConfig) -> FitOptions:
    """What the loop is told."""
    t, c = run.training, run.checkpoint
    rule = SaveRule(c.checkpoint_factor, c.checkpoint_scale, frozenset(c.extra_save_iters or ()), t.train_iters, c.save is not None)
    return FitOptions(
        train_iters=t.train_iters,
        samples_per_step=run.batch.train_batch_size,
        seq_length=run.model.seq_length,
        save_rule=rule,
        eval_interval=t.eval_interval or None,
        eval_at_start=True,
        exit_interval=t.exit_interval,
    )


def schedule_of(run: RunConfig) -> Callable[[int], float]:
    """Steps applied so far -> learning rate of the next."""
    s = run.schedule
    horizon = decay_horizon(run.training.train_iters, s.lr_decay_iters, s.lr_decay_fraction)
    curve = ScheduleConfig(run.optimizer.lr, horizon, s.lr_decay_style, s.warmup, s.min_lr)
    return lambda step: learning_rate(step, curve)


def restore(run: RunConfig, engine: Engine, config: ModelConfig) -> TrainState:
    """The state to start from: of the checkpoint that `load` names, or zero."""
    c = run.checkpoint
    path = find_checkpoint(c.load, c.iteration, c.save) if c.load is not None else None
    if path is None:
        return TrainState()
    saved = load_checkpoint(
        path,
        engine,
        model_config=config.to_dict(),
        load_optimizer=not c.no_load_optim,
        load_rng=not c.no_load_rng,
        finetune=c.finetune,
    )
    return TrainState.from_dict(saved)


def checkpoint_facts(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What an export and a later resume want to know of a run besides its tensors."""
    try:
        eod: int | None = tokenizer.eod
    except DataError:  # a vocabulary without an end of document can train, it cannot stop a generation
        eod = None
    return {
        "tokenizer": {
            "type": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eod": eod,
            "pad": tokenizer.pad,
            "fingerprint": tokenizer.fingerprint(),
        },
        "seq_length": run.model.seq_length,
        "data": run.data.data_path or list(run.data.train_data_paths or ()),
        "run": {
            "name": run.name,
            "global batch": run.batch.train_batch_size,
            "learning rate": run.optimizer.lr,
            "schedule": run.schedule.lr_decay_style,
            "weight decay": run.optimizer.weight_decay,
            "precision": run.precision.dtype,
            "seed": run.training.seed,
        },
    }


class _Plot(Hook):
    """Draws loss.png at the end of a run from its metrics file."""

    def __init__(self, folder: RunFolder, title: str, console: Console) -> None:
        self.folder, self.title, self.console = folder, title, console

    def on_end(self, run: Run, outcome: str) -> None:
        if not self.folder.metrics.is_file():
            return
        try:
            self.console.say(f"plot {plot_metrics(self.folder.metrics, self.folder.plot, self.title)}")
        except ConfigError as error:
            self.console.say(f"no plot: {error.what}")


def reporting_hooks(run: RunConfig, folder: RunFolder, config: ModelConfig, mesh: Mesh, start: int, console: Console) -> list[Hook]:
    """Metrics, console and plot; rank 0 has them, the others none."""
    log = run.logging
    wandb = None
    if log.use_wandb:
        wandb = WandbOptions(
            folder=folder.root / "wandb",
            project=log.wandb_project,
            group=log.wandb_group,
            name=log.wandb_run_name,
            team=log.wandb_team,
            host=log.wandb_host,
            config=run.flat(),
        )
    sinks = Sinks.open(SinkOptions(folder.metrics, start, log.tensorboard_dir, wandb), report=console.say)
    flops = train_flops(config, run.model.seq_length)
    cost = CostModel(flops, mesh.world_size, log.peak_theoretical_tflops, run.training.checkpoint_activations)
    return [_Plot(folder, run.name, console), Reporting(sinks, console, cost, log.log_interval)]


def _opening(run: RunConfig, config: ModelConfig, mesh: Mesh, folder: RunFolder, engine: Engine, start: int) -> str:
    total, inner = count_parameters(config)
    mixers = "+".join(dict.fromkeys(config.layer_types))
    tokens = run.training.train_iters * run.batch.train_batch_size * run.model.seq_length
    shape = f"{mixers} {config.num_layers} x {config.hidden_size}"
    place = f"{mesh.describe()}, {engine.describe()}"
    return Opening(shape, total, inner, tokens, run.training.train_iters, place, str(folder.root), start).line()


@dataclass(frozen=True)
class _Parts:
    """What a rank has built before the loop starts."""

    tokenizer: Tokenizer
    config: ModelConfig
    sets: dict[str, Dataset | None]
    mesh: Mesh
    engine: Engine


def _build(run: RunConfig, env: RankEnvironment) -> _Parts:
    tokenizer = tokenizer_of(run)
    rows = vocabulary_rows(run, tokenizer)
    config = model_config(run, rows)
    sets = datasets(run, rows)
    settings = engine_settings(run)
    init_process_group(env, run.parallel.distributed_backend, settings.timeout_s)
    mesh = Mesh.create(run.parallel.pipe_stages, run.parallel.tensor_ranks, env.world_size, env.rank)
    return _Parts(tokenizer, config, sets, mesh, build_engine(run.parallel.engine, config, mesh, settings, env.local_rank))


def _actions(run: RunConfig, parts: _Parts) -> Actions:
    """Save and evaluate, as the loop calls them."""
    c, engine, tokenizer = run.checkpoint, parts.engine, parts.tokenizer

    def save(state: TrainState) -> Path:
        assert c.save is not None  # the save rule is off without it
        return save_checkpoint(
            c.save,
            engine,
            state.to_dict(),
            model_config=parts.config.to_dict(),
            config_texts=run.config_texts,
            tokenizer={path.name: path for path in tokenizer.files()},
            facts=checkpoint_facts(run, tokenizer),
            keep_last=c.keep_last_n_checkpoints,
            keep=c.extra_save_iters or (),
            save_optimizer=not c.no_save_optim,
            save_rng=not c.no_save_rng,
        )

    def evaluator(name: str, split: str) -> Evaluator | None:
        dataset = parts.sets.get(name)
        if dataset is None or not run.training.eval_iters:
            return None

        def first() -> Iterator[Batch]:
            return iter(open_batches(run, dataset, parts.mesh, tokenizer, 0))

        return Evaluator(engine, first, run.training.eval_iters, split)

    return Actions(save, evaluator("valid", "validation"), evaluator("test", "test"))


def train(run: RunConfig, env: RankEnvironment, command: Sequence[str]) -> Run:
    """Train from the config's start to its end, on this rank of `env`; returns how it ended.

    Raises:
        UserError: any mistake in config, data or checkpoint, with one message.
    """
    console = Console(sys.stdout if env.is_main else open(os.devnull, "w"))  # noqa: SIM115  # for the life of the process
    level = os.environ.get("LOGLEVEL", "INFO") if env.is_main else "ERROR"
    logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stdout)
    folder = RunFolder(Path(run.logging.run_dir), Path(run.logging.log_dir) if run.logging.log_dir else None)
    with ExitStack() as stack:
        if env.is_main:
            create_run_folder(folder.root, print_config(run), command, run.logging.log_dir)
            stack.enter_context(copy_console(folder.logs))
        for line in run.warnings:
            console.say(f"warning: {line}")
        parts = _build(run, env)
        stack.callback(close_process_group)
        stack.callback(parts.engine.close)
        state = restore(run, parts.engine, parts.config)
        console.say(_opening(run, parts.config, parts.mesh, folder, parts.engine, state.iteration))
        hooks: list[Hook] = []
        if env.is_main:
            hooks = reporting_hooks(run, folder, parts.config, parts.mesh, state.iteration, console)
        dataset = parts.sets["train"]
        assert dataset is not None  # an empty train split is refused where it is cut
        batches = open_batches(run, dataset, parts.mesh, parts.tokenizer, state.consumed_samples)
        return fit(parts.engine, iter(batches), schedule_of(run), state, fit_options(run), _actions(run, parts), hooks)
