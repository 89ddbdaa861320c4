"""From the sections of a RunConfig to the plain settings that each part takes: parts know nothing of the configuration.

Used by `assemble.py` alone; one function per part, no behaviour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config.frozen import thaw
from megatron.config.schema import RunConfig
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
from megatron.reliability.guard import GuardOptions
from megatron.synthetics.dataset import SPLITS, read_slices, task_kind
from megatron.synthetics.number_tokenizer import NumberTokenizer
from megatron.training.intervals import SaveRule
from megatron.training.options import FitOptions


def tokenizer_of(run: RunConfig) -> Tokenizer:
    """The tokenizer that the config names; numbers for a synthetic task that is not made of words."""
    spec = run.data.synthetic
    if spec is not None and not task_kind(spec.get("task")).reads_text:
        parts = [part for split in SPLITS for part in read_slices(spec, split)]
        return NumberTokenizer(max(part.task.rows for part in parts))
    return build_tokenizer(run.tokenizer.tokenizer_type, run.tokenizer.vocab_file, run.tokenizer.merge_file)


def vocabulary_rows(run: RunConfig, tokenizer: Tokenizer) -> int:
    """Rows of the embedding: `padded_vocab_size` where it is set, else the tokenizer's size, padded."""
    asked = run.tokenizer.padded_vocab_size
    if asked is None:
        return padded_vocab_size(tokenizer.vocab_size, run.model.make_vocab_size_divisible_by, run.parallel.tensor_ranks)
    # a padding token that the tokenizer's folder lacks needs a row only where samples are filled up with it
    if asked < (tokenizer.vocab_size if run.data.pack_impl == "unpacked" else tokenizer.text_vocab_size):
        raise ConfigError(
            f"padded_vocab_size {asked} is smaller than the tokenizer's {tokenizer.vocab_size} entries",
            where=run.provenance.get("padded_vocab_size"),
            hint="leave it out and it follows the tokenizer",
        )
    return asked


def layer_options(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Mixer -> its options that differ from its defaults: its own keys, else the NeoX keys that its `Config` names."""
    found: dict[str, dict[str, Any]] = {}
    for info in {name: layer_info(name) for name in run.model.layer_types}.values():
        said = {field: run.get(key) for field, key in info.neox_keys.items() if run.get(key) is not None}
        said |= thaw(run.layers.get(info.names[0], {}))
        changed = {field: value for field, value in said.items() if value != info.options[field].default}
        if changed:
            found[info.names[0]] = changed
    return found


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
        layer_options=layer_options(run),
        norm=m.norm if m.use_bias_in_norms or m.norm != "layernorm" else "layernorm_no_bias",
        norm_eps=m.norm_eps,
        mlp=m.mlp_form,
        activation=m.mlp_activation,
        mlp_bias=m.use_bias_in_mlp,
        tie_embeddings=not m.no_weight_tying,
        embedding_scale=m.embedding_scale,
        embedding_norm=m.embedding_norm,
        residual_fp32=m.residual_fp32,
        hidden_dropout=m.hidden_dropout,
        init_method=m.init_method,
        output_init_method=m.output_layer_init_method,
        init_std=m.init_method_std,
        learned_positions=m.max_position_embeddings if m.pos_emb == "learned" else 0,
        parallel_residual=m.gpt_j_residual,
        shared_norm=m.gpt_j_residual and m.gpt_j_tied,
        mixer_init=m.mixer_init,
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
        sequence_parallel=run.parallel.sequence_parallel,
        fp16=dict(run.precision.fp16 or {}),
        kernel_backend=training.kernel_backend,
        loss_chunk_tokens=training.loss_chunk_tokens,
        partition_method=run.parallel.pipe_partition_method,
        weight_decay_rule=optimizer.weight_decay_rule,
        objective=objective(run),
    )


def objective(run: RunConfig) -> Objective:
    """What the loss is. A model that reads a prefix in both directions must not be trained to predict inside it."""
    t, seen = run.training, layer_options(run).get("jrt", {}).get("prefix_length", 0)
    count = run.data.synthetic is not None
    length = t.objective_prefix_length or seen
    if t.objective == "causal":
        if seen:
            raise ConfigError(
                f"objective causal with jrt layers that see the first {seen} tokens in both directions",
                where=run.provenance.get("jrt_prefix_length"),
                why="the model would be trained to predict tokens that it sees",
                hint="objective: jrt (masked tokens in the prefix) or objective: prefix",
            )
        return Objective(count_answers=count, mean_over=t.loss_mean_over)
    if seen and length != seen:
        raise ConfigError(
            f"objective_prefix_length {length} is not jrt_prefix_length {seen}",
            where=run.provenance.get("objective_prefix_length"),
            hint="leave objective_prefix_length out and it follows",
        )
    if length >= run.model.seq_length:
        raise ConfigError(f"a prefix of {length} tokens leaves nothing of seq_length {run.model.seq_length} to predict")
    return Objective(t.objective, length, t.objective_masked_weight, count, t.loss_mean_over)


def masking(run: RunConfig, rows: int) -> Masking | None:
    """Which tokens of a batch are hidden; None unless the objective hides some. rows: of the embedding."""
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
    """What the dry run is told. vocabulary: a word on where the number of rows comes from."""
    parallel, c, iters = run.parallel, run.checkpoint, run.training.train_iters
    world = parallel.pipe_stages * parallel.tensor_ranks * max(1, parallel.data_parallel_size)
    return RunShape(
        pp=parallel.pipe_stages,
        tp=parallel.tensor_ranks,
        dp=max(1, parallel.data_parallel_size),
        settings=engine_settings(run),
        deepspeed=parallel.engine == "deepspeed" or (parallel.engine == "auto" and world > 1),
        global_batch=run.batch.train_batch_size,
        train_iters=iters,
        vocabulary=vocabulary,
        keep=c.keep_last_n_checkpoints,
        saves=_save_rule(run).count(),
    )


def fit_options(run: RunConfig) -> FitOptions:
    """What the loop is told."""
    t = run.training
    return FitOptions(
        train_iters=t.train_iters,
        samples_per_step=run.batch.train_batch_size,
        seq_length=run.model.seq_length,
        save_rule=_save_rule(run),
        eval_interval=t.eval_interval or None,
        eval_at_start=True,
        exit_interval=t.exit_interval,
        guard=guard_options(run),
    )


def guard_options(run: RunConfig) -> GuardOptions:
    """What the guard of bad numbers is told."""
    r = run.reliability
    return GuardOptions(r.skip_budget, r.skip_window, r.on_skip_budget, spike_sigma=r.spike_sigma, spike_window=r.spike_window)


def schedule_config(run: RunConfig) -> ScheduleConfig:
    """The curve of the learning rate that the config describes."""
    s = run.schedule
    horizon = decay_horizon(run.training.train_iters, s.lr_decay_iters, s.lr_decay_fraction)
    return ScheduleConfig(run.optimizer.lr, horizon, s.lr_decay_style, s.warmup, s.min_lr, s.warmup_start_lr)


def schedule_of(run: RunConfig) -> Callable[[int], float]:
    """Steps applied so far -> learning rate of the next, by the config."""
    curve = schedule_config(run)
    return lambda step: learning_rate(step, curve)


def tokenizer_records(run: RunConfig) -> tuple[dict[str, Path], dict[str, Any]]:
    """(files, facts) of the configured tokenizer for a checkpoint that is imported; empty where its files are not here."""
    try:
        tokenizer = tokenizer_of(run)
    except DataError:
        return {}, {}
    return {path.name: path for path in tokenizer.files()}, {"tokenizer": checkpoint_facts(run, tokenizer)["tokenizer"]}


def checkpoint_facts(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What an export and a later resume want to know of a run besides its tensors."""
    special: dict[str, int | None] = {} if tokenizer.bos is None else {"bos": tokenizer.bos}
    for key in ("eod", "pad"):
        try:
            special[key] = getattr(tokenizer, key)
        except DataError:  # a vocabulary without an end of document can train, it cannot stop a generation
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
    """Where metrics go."""
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
