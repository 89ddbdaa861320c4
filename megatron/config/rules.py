"""The cross rules: combinations of keys that cannot work.

Each function reads the finished `RunConfig`, derived values included, and yields what is wrong; `checks.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron.config import model_rules, training_rules
from megatron.config.frozen import thaw
from megatron.config.problems import Violation
from megatron.config.schema import RunConfig
from megatron.errors import ConfigError
from megatron.reliability.signals import seconds_of, signal_numbers

_SPLITS = ("train", "valid", "test")
_OPTIMIZER_HINT = "write optimizer: {type: Adam, params: {lr: 3.0e-4, betas: [0.9, 0.95]}}"


def mesh(run: RunConfig) -> Iterator[Violation]:
    """Processes, engine and ZeRO."""
    p = run.parallel
    cells, context = p.model_processes, p.context_parallel_size
    if run.world_size % cells:
        message = (
            f"{run.world_size} processes cannot be divided into pipe_parallel_size {p.pipe_stages}"
            + (f" x context_parallel_size {context}" if context > 1 else "")
            + f" x model_parallel_size {p.tensor_ranks}"
        )
        hint = "the number of processes must be a multiple of their product"
        keys = ("pipe_parallel_size", "context_parallel_size", "model_parallel_size", "global_num_gpus")
        yield Violation(keys if context > 1 else (keys[0], *keys[2:]), message, hint)
    if p.engine == "single" and (count := max(run.world_size, cells)) > 1:
        message = f"engine: single runs one process, not {count}"
        yield Violation(("engine", "pipe_parallel_size", "model_parallel_size"), message, "use engine: auto")
    zero, zero_keys = p.zero_optimization or {}, ("zero_optimization.stage", "zero_optimization")
    if p.zero_optimization is not None and zero.get("stage") not in (0, 1, 2, 3):
        message = f"zero_optimization.stage is {thaw(zero.get('stage'))!r}, which is not 0, 1, 2 or 3"
        yield Violation(zero_keys, message, "write zero_optimization: {stage: 1}")
    if p.zero_stage in (2, 3) and p.pipe_stages > 1:
        message = f"zero_optimization.stage {p.zero_stage} does not go together with a pipeline"
        hint = "write zero_optimization: {stage: 1}, or pipe_parallel_size: 1"
        yield Violation((*zero_keys, "pipe_parallel_size"), message, hint)
    if any("offload" in key and _is_on(value) for key, value in zero.items()):
        message = "offloading optimizer state to the CPU or to disk is not built"
        yield Violation(("zero_optimization",), message, "remove the offload entries of zero_optimization")


def _is_on(offload: object) -> bool:
    """Does an offload entry ask for something? `{device: none}` is DeepSpeed's way to say no."""
    return str(offload.get("device", "none")).lower() != "none" if isinstance(offload, Mapping) else bool(offload)


def optimizer(run: RunConfig) -> Iterator[Violation]:
    """Optimizer and number formats."""
    o = run.optimizer
    if o.optimizer_type != "adamw":
        message = f"optimizer.type {o.optimizer.get('type')!r} is not built"
        yield Violation(("optimizer.type", "optimizer"), message, "use Adam (which is AdamW)")
    if "type" not in o.optimizer:
        yield Violation(("optimizer",), "optimizer has no type", _OPTIMIZER_HINT)
    if o.lr <= 0:
        message = "the learning rate is not given: optimizer.params.lr must be above 0"
        yield Violation(("optimizer",), message, _OPTIMIZER_HINT)
    if "weight_decay" in o.params:
        message = "NeoX refuses weight_decay inside optimizer.params"
        yield Violation(("optimizer.params", "optimizer"), message, "write weight_decay as a key of its own")
    for key, example in (("fp16", "{enabled: true, loss_scale: 0}"), ("bf16", "{enabled: true}")):
        values = getattr(run.precision, key)
        if values is not None and not isinstance(values.get("enabled"), bool):
            yield Violation((key,), f"{key} has no enabled: true or false", f"write {key}: {example}")


def schedule(run: RunConfig) -> Iterator[Violation]:
    """Length of the training and the learning rate over it."""
    s, t, lr = run.schedule, run.training, run.optimizer.lr
    if not t.train_iters and not t.train_epochs:
        hint = "write train_iters: the number of optimizer steps"
        yield Violation(("train_iters", "train_epochs"), "train_iters is not given", hint, missing=True)
    if t.train_iters and t.train_epochs:
        yield Violation(("train_iters", "train_epochs"), "train_iters and train_epochs are both given", "keep train_iters")
    if 0 < lr < s.min_lr:
        hint = "min_lr is the floor of the schedule, often a tenth of optimizer.params.lr"
        message = f"min_lr {s.min_lr} is above the learning rate {lr}"
        yield Violation(("min_lr", "optimizer.params.lr", "optimizer"), message, hint)
    if s.warmup > 1 or (s.warmup == 1 and s.lr_decay_style != "constant"):
        message = f"warmup {s.warmup} leaves no steps for the {s.lr_decay_style} decay"
        yield Violation(("warmup", "lr_decay_style"), message, "warmup is a share of lr_decay_iters, such as 0.01")
    if s.override_lr_scheduler and s.use_checkpoint_lr_scheduler:
        keys = ("override_lr_scheduler", "use_checkpoint_lr_scheduler")
        yield Violation(keys, f"{' and '.join(keys)} contradict each other", "keep one of them")
    if s.lr_decay_iters == 0:
        yield Violation(("lr_decay_iters",), "lr_decay_iters is 0", "leave it unset: it follows train_iters")


def checkpoints(run: RunConfig) -> Iterator[Violation]:
    """When checkpoints are saved, how many are kept, and which one is loaded."""
    c, factor_keys = run.checkpoint, ("checkpoint_scale", "checkpoint_factor")
    if c.keep_last_n_checkpoints == 1:
        hint = "write 2 or more: with a single checkpoint one damaged file is the end of the run"
        yield Violation(("keep_last_n_checkpoints",), "keep_last_n_checkpoints is 1", hint)
    if c.save and not c.checkpoint_factor and not c.extra_save_iters:
        message = "save is given, but neither checkpoint_factor nor extra_save_iters says when"
        yield Violation(("save", "checkpoint_factor"), message, "write checkpoint_factor: the steps between checkpoints")
    if c.checkpoint_scale == "log" and 0 < (c.checkpoint_factor or 0) <= 1:
        message = f"checkpoint_scale: log needs checkpoint_factor above 1, not {c.checkpoint_factor}"
        yield Violation(factor_keys, message, "2 saves at steps 1, 2, 4, 8, ...")
    if c.checkpoint_scale == "linear" and (c.checkpoint_factor or 1) % 1:
        message = f"checkpoint_factor {c.checkpoint_factor} is not a whole number of steps"
        yield Violation(factor_keys, message, "fractions are for checkpoint_scale: log")
    if c.iteration is not None and not (c.load or c.save):
        message = "iteration is given, but there is no load to take it from"
        yield Violation(("iteration", "load"), message, "write load: the folder of the checkpoints")
    if run.reliability.on_skip_budget == "rewind" and c.save is None:
        message = "on_skip_budget: rewind has no checkpoint to go back to"
        yield Violation(("on_skip_budget", "save"), message, "set save, or on_skip_budget: stop")


def data(run: RunConfig) -> Iterator[Violation]:
    """Batch sizes and corpora."""
    d, list_keys = run.data, tuple(f"{split}_data_paths" for split in _SPLITS)
    lists = [getattr(d, key) or () for key in list_keys]
    if not run.batch.train_micro_batch_size_per_gpu and not run.batch.train_batch_size:
        message = "neither train_micro_batch_size_per_gpu nor train_batch_size is given"
        hint = "write train_micro_batch_size_per_gpu: the sequences that fit on one device"
        yield Violation(("train_micro_batch_size_per_gpu",), message, hint, missing=True)
    if d.data_path and any(lists):
        hint = "keep data_path with split, or the three lists"
        yield Violation(("data_path", *list_keys), "data_path and *_data_paths are both given", hint)
    if any(lists) and not all(lists):
        message = "train_data_paths, valid_data_paths and test_data_paths must be given together"
        yield Violation(list_keys, message, "two of them may name the same prefix")
    if problem := _synthetic_problem(run):
        yield Violation(("synthetic",), f"synthetic: {problem}", "docs/synthetics.md lists the parameters of every task")
    for split, paths in zip(_SPLITS, lists, strict=True):
        key = f"{split}_data_weights"
        if (weights := getattr(d, key)) and len(weights) != len(paths):
            message = f"{key} has {len(weights)} entries for {len(paths)} {split}_data_paths"
            yield Violation((key,), message, "one weight for each prefix")


def _synthetic_problem(run: RunConfig) -> str:
    """What is wrong with the parameters of a synthetic task; empty if nothing is, or if only a tokenizer can tell."""
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


def limits(run: RunConfig) -> Iterator[Violation]:
    """Time limit, signals, and the steps that are profiled."""
    r, log = run.reliability, run.logging
    readers: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
        ("time_limit", seconds_of, 'write "3:50:00" (hours), "45:00" (minutes) or seconds'),
        ("exit_signals", signal_numbers, "name signals such as SIGTERM, SIGUSR1, SIGINT; an empty list catches none"),
    )
    for key, read, hint in readers:
        try:
            read(getattr(r, key))
        except ConfigError as error:
            yield Violation((key,), error.what + (f": {error.why}" if error.why else ""), hint)
    if log.profile and log.profile_step_stop <= log.profile_step_start:
        keys = ("profile_step_start", "profile_step_stop")
        yield Violation(keys, "profile_step_stop must be above profile_step_start")


RULES: tuple[Callable[[RunConfig], Iterator[Violation]], ...] = (
    model_rules.missing_sizes,
    model_rules.sizes_that_divide,
    model_rules.contradictions,
    mesh,
    optimizer,
    schedule,
    checkpoints,
    data,
    limits,
    training_rules.sharding,
    training_rules.objective,
)
