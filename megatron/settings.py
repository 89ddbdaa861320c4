"""From the sections of a RunConfig to the plain settings of each part: parts know nothing of the configuration.

One function per part, no behaviour. `fill` copies fields that have the name of a key, so a new key is one line in its section
and one in the part's dataclass; only what differs in name or value is written here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron.config.frozen import thaw
from megatron.config.schema import RunConfig, sections
from megatron.data.masking import Masking
from megatron.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size
from megatron.engine.base import EngineSettings
from megatron.engine.schedule import ScheduleConfig, decay_horizon, learning_rate
from megatron.errors import ConfigError, DataError
from megatron.model.config import ModelConfig
from megatron.model.objectives import Objective
from megatron.observe.runfolder import RunFolder
from megatron.observe.sinks import SinkOptions, WandbOptions
from megatron.planning.dry_run import RunShape
from megatron.registry import layer_info
from megatron.reliability.guard_options import GuardOptions
from megatron.synthetics.dataset import SPLITS, read_slices, task_kind
from megatron.synthetics.number_tokenizer import NumberTokenizer
from megatron.training.intervals import SaveRule
from megatron.training.options import FitOptions

Part = TypeVar("Part")
PROPERTIES = (property, functools.cached_property)


def tokenizer_of(run: RunConfig) -> Tokenizer:
    """The tokenizer that the config names; numbers for a synthetic task without text."""
    spec = run.data.synthetic
    if spec is not None and not task_kind(spec.get("task")).reads_text:
        parts = [part for split in SPLITS for part in read_slices(spec, split)]
        return NumberTokenizer(max(part.task.rows for part in parts))
    return build_tokenizer(run.tokenizer.tokenizer_type, run.tokenizer.vocab_file, run.tokenizer.merge_file)


def vocabulary_rows(run: RunConfig, tokenizer: Tokenizer) -> int:
    """Rows of the embedding: `padded_vocab_size` if it is set, else the tokenizer's size, padded.

    Raises:
        ConfigError: `padded_vocab_size` is smaller than the vocabulary.
    """
    rows = run.tokenizer.padded_vocab_size
    if rows is None:
        return padded_vocab_size(tokenizer.vocab_size, run.model.make_vocab_size_divisible_by, run.parallel.tensor_ranks)
    # A padding token that the tokenizer's folder lacks needs a row only if samples are padded with it.
    if rows < (tokenizer.vocab_size if run.data.pack_impl == "unpacked" else tokenizer.text_vocab_size):
        raise ConfigError(
            f"padded_vocab_size {rows} is smaller than the tokenizer's {tokenizer.vocab_size} entries",
            where=run.provenance.get("padded_vocab_size"),
            hint="leave it out and it follows the tokenizer",
        )
    return rows


def layer_options(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Mixer -> its options that differ from its defaults: its own keys, else the NeoX keys that its `Config` names."""
    changed: dict[str, dict[str, Any]] = {}
    for info in {name: layer_info(name) for name in run.model.layer_types}.values():
        values = {field: run.get(key) for field, key in info.neox_keys.items() if run.get(key) is not None}
        values |= thaw(run.layers.get(info.names[0], {}))
        if options := {field: value for field, value in values.items() if value != info.options[field].default}:
            changed[info.names[0]] = options
    return changed


def shared_names(part: type) -> dict[str, str]:
    """Field of a part's dataclass -> the section that has a key, or a value derived from its keys, of the same name."""
    owners: dict[str, str] = {}
    for section, cls in sections().items():
        names = {*cls.model_fields, *(name for name, value in vars(cls).items() if isinstance(value, PROPERTIES))}
        for field in dataclasses.fields(part):
            if field.name in names:
                assert field.name not in owners, f"{field.name} of {part.__name__} is in {owners[field.name]} and {section}"
                owners[field.name] = section
    return owners


def fill(part: type[Part], run: RunConfig, **given: Any) -> Part:
    """Settings of a part: the fields that are given, and all others that bear the name of a key of the run.

    Args:
        part: dataclass of the settings. A field that is neither given nor named as a key keeps its default.
        run: configuration.
        given: fields whose value is not that of the key of the same name, or that have another name than their key.
    """
    owners = shared_names(part)
    copied = {name: getattr(getattr(run, section), name) for name, section in owners.items() if name not in given}
    return part(**copied, **given)


def model_config(run: RunConfig, rows: int) -> ModelConfig:
    """The model's mathematics.

    Args:
        run: configuration.
        rows: rows of the embedding, padding included.
    """
    m = run.model
    return fill(
        ModelConfig,
        run,
        vocab_size=rows,
        num_heads=m.num_attention_heads,
        layer_options=layer_options(run),
        norm=m.norm if m.use_bias_in_norms or m.norm != "layernorm" else "layernorm_no_bias",
        mlp=m.mlp_form,
        activation=m.mlp_activation,
        mlp_bias=m.use_bias_in_mlp,
        tie_embeddings=not m.no_weight_tying,
        output_init_method=m.output_layer_init_method,
        init_std=m.init_method_std,
        learned_positions=m.max_position_embeddings if m.pos_emb == "learned" else 0,
        parallel_residual=m.gpt_j_residual,
        shared_norm=m.gpt_j_residual and m.gpt_j_tied,
    )


def engine_settings(run: RunConfig) -> EngineSettings:
    """Settings of the engine."""
    training = run.training
    return fill(
        EngineSettings,
        run,
        micro_batch=run.batch.train_micro_batch_size_per_gpu,
        gradient_accumulation=run.batch.gradient_accumulation_steps,
        activation_checkpoint_interval=training.checkpoint_num_layers if training.checkpoint_activations else 0,
        fp32_grad_accum=run.precision.grad_accum_dtype == "fp32",
        fp16=dict(run.precision.fp16 or {}),
        partition_method=run.parallel.pipe_partition_method,
        objective=objective(run),
    )


def objective(run: RunConfig) -> Objective:
    """The training objective; `config/training_rules.py` refuses one that contradicts the layers' prefix."""
    t, prefix = run.training, layer_options(run).get("jrt", {}).get("prefix_length", 0)
    count = run.data.synthetic is not None
    length = t.objective_prefix_length or prefix
    if t.objective == "causal":
        return Objective(count_answers=count, mean_over=t.loss_mean_over)
    return Objective(t.objective, length, t.objective_masked_weight, count, t.loss_mean_over)


def masking(run: RunConfig, rows: int) -> Masking | None:
    """Masking of tokens in a batch; None unless the objective masks some.

    Args:
        run: configuration.
        rows: rows of the embedding, padding included.

    Raises:
        ConfigError: the mask token is not in the vocabulary.
    """
    t = run.training
    if t.objective != "jrt":
        return None
    token = rows - 1 if t.objective_mask_token is None else t.objective_mask_token
    if token >= rows:
        raise ConfigError(f"objective_mask_token {token} is outside the vocabulary of {rows} rows")
    return Masking(objective(run).prefix_length, token, t.objective_mask_rate, t.seed)


def _save_rule(run: RunConfig) -> SaveRule:
    c, extra = run.checkpoint, frozenset(run.checkpoint.extra_save_iters or ())
    return SaveRule(c.checkpoint_factor, c.checkpoint_scale, extra, run.training.train_iters, c.save is not None)


def run_shape(run: RunConfig, vocabulary: str) -> RunShape:
    """Sizes of the dry run.

    Args:
        run: configuration.
        vocabulary: source of the number of vocabulary rows, in words.
    """
    parallel, c, iters = run.parallel, run.checkpoint, run.training.train_iters
    replicas = max(parallel.context_parallel_size, parallel.data_parallel_size)
    world = parallel.pipe_stages * parallel.tensor_ranks * replicas
    return RunShape(
        pp=parallel.pipe_stages,
        tp=parallel.tensor_ranks,
        dp=replicas,
        cp=parallel.context_parallel_size,
        settings=engine_settings(run),
        deepspeed=parallel.engine == "deepspeed" or (parallel.engine == "auto" and world > 1),
        global_batch=run.batch.train_batch_size,
        train_iters=iters,
        vocabulary=vocabulary,
        keep=c.keep_last_n_checkpoints,
        saves=_save_rule(run).count(),
    )


def fit_options(run: RunConfig) -> FitOptions:
    """Options of the training loop."""
    return fill(
        FitOptions,
        run,
        samples_per_step=run.batch.train_batch_size,
        save_rule=_save_rule(run),
        eval_interval=run.training.eval_interval or None,
        eval_at_start=True,
        guard=guard_options(run),
    )


def guard_options(run: RunConfig) -> GuardOptions:
    """Options of the guard of non-finite numbers and loss spikes."""
    r = run.reliability
    return fill(GuardOptions, run, budget=r.skip_budget, window=r.skip_window, on_budget=r.on_skip_budget)


def schedule_config(run: RunConfig) -> ScheduleConfig:
    """The learning-rate schedule that the config describes."""
    s = run.schedule
    horizon = decay_horizon(run.training.train_iters, s.lr_decay_iters, s.lr_decay_fraction)
    return fill(ScheduleConfig, run, horizon=horizon, style=s.lr_decay_style, warmup_start=s.warmup_start_lr)


def schedule_of(run: RunConfig) -> Callable[[int], float]:
    """Number of applied steps -> learning rate of the next."""
    curve = schedule_config(run)
    return lambda step: learning_rate(step, curve)


def tokenizer_records(run: RunConfig) -> tuple[dict[str, Path], dict[str, Any]]:
    """Files and metadata of the tokenizer for a checkpoint that is imported; empty if its files are missing."""
    try:
        tokenizer = tokenizer_of(run)
    except DataError:
        return {}, {}
    return {path.name: path for path in tokenizer.files()}, {"tokenizer": checkpoint_facts(run, tokenizer)["tokenizer"]}


def checkpoint_facts(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Metadata of a checkpoint for exports and resumed runs."""
    special: dict[str, int | None] = {} if tokenizer.bos is None else {"bos": tokenizer.bos}
    for key in ("eod", "pad"):
        try:
            special[key] = getattr(tokenizer, key)
        except DataError:  # a vocabulary without an end of document can train, but not stop a generation
            special[key] = None
    return {
        "tokenizer": {
            "type": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            **special,
            "fingerprint": tokenizer.fingerprint(),
        },
        "seq_length": run.model.seq_length,
        "max_position_embeddings": run.model.max_position_embeddings,
        "context_parallel_size": run.parallel.context_parallel_size,  # for the reader: a checkpoint loads on any
        "data": run.data.data_path or list(run.data.train_data_paths or run.data.train_stream or ()),
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


def sink_options(run: RunConfig, folder: RunFolder, resume_from: int) -> SinkOptions:
    """Destinations of metrics.

    Args:
        run: configuration.
        folder: folder of the run.
        resume_from: step of the checkpoint; metrics of later steps are dropped.
    """
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
            mode=log.wandb_mode,
            config=run.flat(),
        )
    return SinkOptions(folder.metrics, resume_from, log.tensorboard_dir, wandb)
