"""The cross rules: combinations of keys that cannot work, one row each.

A row names the keys it is about, when it is broken, and the two sentences a person reads. Rules are tested on the
finished `RunConfig`, so they see derived values too. It is a table, so it may be long; `checks.py` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.frozen import thaw
from megatron.config.model_rules import MODEL_RULES
from megatron.config.reliability_rules import RELIABILITY_RULES
from megatron.config.rule import Rule
from megatron.config.schema import RunConfig
from megatron.config.training_rules import TRAINING_RULES
from megatron.errors import ConfigError


def _is_on(offload: object) -> bool:
    """Whether an offload entry of zero_optimization asks for something; `{device: none}` is DeepSpeed's way to say off."""
    return str(offload.get("device", "none")).lower() != "none" if isinstance(offload, Mapping) else bool(offload)


def _save_steps(run: RunConfig) -> bool:
    return bool(run.checkpoint.checkpoint_factor or run.checkpoint.extra_save_iters)


def _data_lists(run: RunConfig) -> list[bool]:
    data = run.data
    return [bool(paths) for paths in (data.train_data_paths, data.valid_data_paths, data.test_data_paths)]


def _unequal_weights(run: RunConfig) -> list[str]:
    found = []
    for part in ("train", "valid", "test"):
        paths, weights = getattr(run.data, f"{part}_data_paths"), getattr(run.data, f"{part}_data_weights")
        if weights and len(weights) != len(paths or ()):
            found.append(f"{part}_data_weights has {len(weights)} entries for {len(paths or ())} {part}_data_paths")
    return found


def _synthetic_problem(run: RunConfig) -> str:
    """What is wrong with the parameters of a synthetic task; empty where nothing is, or a tokenizer must be known to say."""
    if run.data.synthetic is None:
        return ""
    from megatron.synthetics.dataset import SPLITS, read_slices, task_kind  # needs numpy

    try:
        if not task_kind(run.data.synthetic.get("task")).reads_text:
            for split in SPLITS:
                read_slices(run.data.synthetic, split)
    except ConfigError as error:
        return "; ".join(part for part in (error.what, error.why, error.hint) if part)
    return ""


def _cells(run: RunConfig) -> int:
    return run.parallel.pipe_stages * run.parallel.tensor_ranks


_OPTIMIZERS = ("adamw",)

RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    *RELIABILITY_RULES,
    *TRAINING_RULES,
    Rule(
        ("seq_length",),
        lambda r: not r.model.seq_length,
        lambda r: "seq_length is not given",
        "write seq_length: the tokens of a training sample",
        needs=True,
    ),
    Rule(
        ("keep_last_n_checkpoints",),
        lambda r: r.checkpoint.keep_last_n_checkpoints == 1,
        lambda r: "keep_last_n_checkpoints is 1",
        "write 2 or more: with a single checkpoint one damaged file is the end of the run",
    ),
    Rule(
        ("train_iters", "train_epochs"),
        lambda r: not r.training.train_iters and not r.training.train_epochs,
        lambda r: "train_iters is not given",
        "write train_iters: the number of optimizer steps",
        needs=True,
    ),
    Rule(
        ("train_micro_batch_size_per_gpu",),
        lambda r: not r.batch.train_micro_batch_size_per_gpu and not r.batch.train_batch_size,
        lambda r: "neither train_micro_batch_size_per_gpu nor train_batch_size is given",
        "write train_micro_batch_size_per_gpu: the sequences that fit on one device",
        needs=True,
    ),
    Rule(
        ("pipe_parallel_size", "model_parallel_size", "global_num_gpus"),
        lambda r: r.world_size % _cells(r) != 0,
        lambda r: (
            f"{r.world_size} processes cannot be divided into pipe_parallel_size {r.parallel.pipe_stages}"
            f" x model_parallel_size {r.parallel.tensor_ranks}"
        ),
        "the number of processes must be a multiple of their product",
    ),
    Rule(
        ("engine", "pipe_parallel_size", "model_parallel_size"),
        lambda r: r.parallel.engine == "single" and max(r.world_size, _cells(r)) > 1,
        lambda r: f"engine: single runs one process, but {max(r.world_size, _cells(r))} are asked for",
        "use engine: auto",
    ),
    Rule(
        ("zero_optimization.stage", "zero_optimization"),
        lambda r: r.parallel.zero_optimization is not None and r.parallel.zero_optimization.get("stage") not in (0, 1, 2, 3),
        lambda r: f"zero_optimization.stage is {thaw((r.parallel.zero_optimization or {}).get('stage'))!r}; there are 0 to 3",
        "write zero_optimization: {stage: 1}",
    ),
    Rule(
        ("zero_optimization.stage", "zero_optimization", "pipe_parallel_size"),
        lambda r: r.parallel.zero_stage in (2, 3) and r.parallel.pipe_stages > 1,
        lambda r: f"zero_optimization.stage {r.parallel.zero_stage} does not go together with a pipeline",
        "write zero_optimization: {stage: 1}, or pipe_parallel_size: 1",
    ),
    Rule(
        ("zero_optimization",),
        lambda r: any("offload" in key and _is_on(value) for key, value in (r.parallel.zero_optimization or {}).items()),
        lambda r: "offloading optimizer state to the CPU or to disk is not built",
        "remove the offload entries of zero_optimization",
    ),
    Rule(
        ("optimizer.type", "optimizer"),
        lambda r: r.optimizer.optimizer_type not in _OPTIMIZERS,
        lambda r: f"optimizer.type {r.optimizer.optimizer.get('type')!r} is not built",
        "use Adam (which is AdamW)",
    ),
    Rule(
        ("optimizer",),
        lambda r: "type" not in r.optimizer.optimizer,
        lambda r: "optimizer has no type",
        "write optimizer: {type: Adam, params: {lr: 3.0e-4, betas: [0.9, 0.95]}}",
    ),
    Rule(
        ("optimizer",),
        lambda r: r.optimizer.lr <= 0,
        lambda r: "the learning rate is not given: optimizer.params.lr must be above 0",
        "write optimizer: {type: Adam, params: {lr: 3.0e-4, betas: [0.9, 0.95]}}",
    ),
    Rule(
        ("optimizer.params", "optimizer"),
        lambda r: "weight_decay" in r.optimizer.params,
        lambda r: "weight_decay inside optimizer.params is refused by NeoX",
        "write weight_decay as a key of its own",
    ),
    Rule(
        ("fp16",),
        lambda r: r.precision.fp16 is not None and not isinstance(r.precision.fp16.get("enabled"), bool),
        lambda r: "fp16 has no enabled: true or false",
        "write fp16: {enabled: true, loss_scale: 0}",
    ),
    Rule(
        ("bf16",),
        lambda r: r.precision.bf16 is not None and not isinstance(r.precision.bf16.get("enabled"), bool),
        lambda r: "bf16 has no enabled: true or false",
        "write bf16: {enabled: true}",
    ),
    Rule(
        ("min_lr", "optimizer.params.lr", "optimizer"),
        lambda r: 0 < r.optimizer.lr < r.schedule.min_lr,
        lambda r: f"min_lr {r.schedule.min_lr} is above the learning rate {r.optimizer.lr}",
        "min_lr is the floor of the schedule, often a tenth of optimizer.params.lr",
    ),
    Rule(
        ("warmup", "lr_decay_style"),
        lambda r: r.schedule.warmup > 1 or (r.schedule.warmup == 1 and r.schedule.lr_decay_style != "constant"),
        lambda r: f"warmup {r.schedule.warmup} leaves no steps for the {r.schedule.lr_decay_style} decay",
        "warmup is a share of lr_decay_iters, such as 0.01",
    ),
    Rule(
        ("override_lr_scheduler", "use_checkpoint_lr_scheduler"),
        lambda r: r.schedule.override_lr_scheduler and r.schedule.use_checkpoint_lr_scheduler,
        lambda r: "override_lr_scheduler and use_checkpoint_lr_scheduler contradict each other",
        "keep one of them",
    ),
    Rule(
        ("train_iters", "train_epochs"),
        lambda r: bool(r.training.train_iters and r.training.train_epochs),
        lambda r: "train_iters and train_epochs are both given",
        "keep train_iters",
    ),
    Rule(
        ("lr_decay_iters",),
        lambda r: r.schedule.lr_decay_iters == 0,
        lambda r: "lr_decay_iters is 0",
        "leave it unset: it follows train_iters",
    ),
    Rule(
        ("save", "checkpoint_factor"),
        lambda r: bool(r.checkpoint.save) and not _save_steps(r),
        lambda r: "save is given, but neither checkpoint_factor nor extra_save_iters says when",
        "write checkpoint_factor: the steps between checkpoints",
    ),
    Rule(
        ("checkpoint_scale", "checkpoint_factor"),
        lambda r: r.checkpoint.checkpoint_scale == "log" and 0 < (r.checkpoint.checkpoint_factor or 0) <= 1,
        lambda r: f"checkpoint_scale: log needs checkpoint_factor above 1, not {r.checkpoint.checkpoint_factor}",
        "2 saves at steps 1, 2, 4, 8, ...",
    ),
    Rule(
        ("checkpoint_scale", "checkpoint_factor"),
        lambda r: r.checkpoint.checkpoint_scale == "linear" and (r.checkpoint.checkpoint_factor or 1) % 1 != 0,
        lambda r: f"checkpoint_factor {r.checkpoint.checkpoint_factor} is not a whole number of steps",
        "fractions are for checkpoint_scale: log",
    ),
    Rule(
        ("iteration", "load"),
        lambda r: r.checkpoint.iteration is not None and not (r.checkpoint.load or r.checkpoint.save),
        lambda r: "iteration is given, but there is no load to take it from",
        "write load: the folder of the checkpoints",
    ),
    Rule(
        ("data_path", "train_data_paths", "valid_data_paths", "test_data_paths"),
        lambda r: bool(r.data.data_path) and any(_data_lists(r)),
        lambda r: "data_path and *_data_paths are both given",
        "keep data_path with split, or the three lists",
    ),
    Rule(
        ("train_data_paths", "valid_data_paths", "test_data_paths"),
        lambda r: any(_data_lists(r)) and not all(_data_lists(r)),
        lambda r: "train_data_paths, valid_data_paths and test_data_paths must be given together",
        "the same prefix may stand in two of them",
    ),
    Rule(
        ("synthetic",),
        lambda r: bool(_synthetic_problem(r)),
        lambda r: f"synthetic: {_synthetic_problem(r)}",
        "docs/synthetics.md lists the parameters of every task",
    ),
    Rule(
        ("train_data_weights", "valid_data_weights", "test_data_weights"),
        lambda r: bool(_unequal_weights(r)),
        lambda r: "; ".join(_unequal_weights(r)),
        "one weight for each prefix",
    ),
    Rule(
        ("profile_step_start", "profile_step_stop"),
        lambda r: r.logging.profile and r.logging.profile_step_stop <= r.logging.profile_step_start,
        lambda r: "profile_step_stop must be above profile_step_start",
    ),
)
