"""What may stand inside dictionary-valued keys: names, types and bounds, as a table of data.

Entries without effect are DeepSpeed's own names, so that a slip in one of them is told as any other slip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

_SHARE = Annotated[float, Field(ge=0, lt=1)]
_FORMAT = Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"]


@dataclass(frozen=True)
class Entry:
    """One entry: its type (an annotation, or text as in `kinds.parse_type`), what it does, its default, its least and most."""

    kind: Any
    doc: str = ""
    default: Any = None
    low: float | None = None
    high: float | None = None


NO_EFFECT = "Without effect here."
_COUNT = Entry("int", NO_EFFECT, low=0)
_SWITCH = Entry("bool", NO_EFFECT)
_NUMBER = Entry("float", NO_EFFECT)
_WORD = Entry("str", NO_EFFECT)
_OFFLOAD = "Not built: a value that is not false is refused."


def _all(entry: Entry, names: str) -> dict[str, Entry]:
    return dict.fromkeys(names.split(), entry)


_LARGEST_POWER = 127  # of two, in the fp32 that the loss is scaled in
_SCALE: dict[str, Entry] = {
    "loss_scale": Entry("float", "Fixed scale of the loss; 0 finds one.", 0, low=0, high=2.0**_LARGEST_POWER),
    "initial_scale_power": Entry(
        "int", "The scale that is found starts at 2 to the power of this.", 16, low=0, high=_LARGEST_POWER
    ),
    "loss_scale_window": Entry("int", "Steps without overflow after which the scale doubles.", 1000, low=1),
    "hysteresis": Entry("int", "Overflows before the scale is halved.", 2, low=1),
    "min_loss_scale": Entry("float", "The scale is not halved below it.", 1, low=0, high=2.0**_LARGEST_POWER),
}
_SCALE_UNREAD = {name: Entry(entry.kind, NO_EFFECT, low=entry.low, high=entry.high) for name, entry in _SCALE.items()}

# key -> dotted name inside it -> entry.
NESTED: dict[str, dict[str, Entry]] = {
    "optimizer": {
        "type": Entry("str", "Adam, which is AdamW; no other is built."),
        "params": Entry("dict", "Numbers of the optimizer."),
        "params.lr": Entry("float", "The peak learning rate; it must be above 0.", low=0),
        "params.betas": Entry(tuple[_SHARE, _SHARE], "Adam's two decay rates, each from 0 to below 1.", (0.9, 0.999)),
        "params.eps": Entry("float", "Adam's epsilon.", 1e-8, low=0),
        "params.weight_decay": Entry("float", "Refused, as by NeoX: weight_decay is a key of its own.", low=0),
    },
    "zero_optimization": {
        "stage": Entry(
            "int | List[int]", "What is cut over data-parallel ranks: 0 nothing, 1 optimizer, 2 gradients, 3 weights."
        ),
        **_all(
            _SWITCH,
            "allgather_partitions overlap_comm reduce_scatter contiguous_gradients load_from_fp32_weights elastic_checkpoint"
            " use_multi_rank_bucket_allreduce compute_grad_norm stage3_gather_16bit_weights_on_model_save"
            " stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients"
            " parameter_alignment memory_efficient_linear override_module_apply log_trace_cache_warnings enable_sanity_checks",
        ),
        **_all(
            _COUNT,
            "allgather_bucket_size reduce_bucket_size sub_group_size stage3_prefetch_bucket_size"
            " stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters"
            " stage3_max_reuse_distance zero_hpz_partition_size",
        ),
        **_all(Entry("bool | dict", _OFFLOAD), "cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
        **_all(Entry("bool | dict", _OFFLOAD), "offload_param offload_optimizer"),
    },
    "fp16": {
        "enabled": Entry("bool", "Train in fp16; must be given.", False),
        **_SCALE,
        **_all(_SWITCH, "fp16 auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        "type": _WORD,
    },
    "bf16": {
        "enabled": Entry("bool", "Train in bfloat16 with fp32 master weights; must be given.", False),
        **_SCALE_UNREAD,
        **_all(_SWITCH, "bf16 immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"),
    },
    "data_types": {"grad_accum_dtype": Entry(_FORMAT, "The format in which gradients are summed.", "fp32")},
    "scheduler": {"type": _WORD, "params": Entry("dict", NO_EFFECT)},
    "activation_checkpointing": {
        **_all(
            _SWITCH,
            "partition_activations cpu_checkpointing contiguous_memory_optimization synchronize_checkpoint_boundary profile",
        ),
        "number_checkpoints": _COUNT,
    },
    "comms_logger": {**_all(_SWITCH, "enabled verbose prof_all debug"), "prof_ops": Entry("list", NO_EFFECT)},
    "flops_profiler": {
        **_all(_SWITCH, "enabled detailed"),
        "profile_step": _COUNT,
        "module_depth": Entry("int", NO_EFFECT, low=-1),
        "top_modules": _COUNT,
        "output_file": _WORD,
        "recompute_fwd_factor": _NUMBER,
    },
    "autotuning": {
        **_all(_SWITCH, "enabled fast overwrite"),
        **_all(_WORD, "results_dir exps_dir tuner_type metric metric_path model_info_path"),
        **_all(
            _COUNT,
            "mp_size start_profile_step end_profile_step tuner_early_stopping tuner_num_trials max_train_batch_size"
            " min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu"
            " num_tuning_micro_batch_sizes",
        ),
        **_all(Entry("dict", NO_EFFECT), "arg_mappings model_info"),
    },
    "amp": {"enabled": _SWITCH, "opt_level": _WORD},
    "tensorboard": {"enabled": _SWITCH, "output_path": _WORD, "job_name": _WORD},
    "wandb": {"enabled": _SWITCH, "group": _WORD, "team": _WORD, "project": _WORD},
    "csv_monitor": {"enabled": _SWITCH, "output_path": _WORD, "job_name": _WORD},
    "checkpoint": {
        "tag_validation": _WORD,
        **_all(_SWITCH, "load_universal use_node_local_storage"),
        "parallel_write": Entry("dict", NO_EFFECT),
    },
    "synthetic": {
        "task": Entry("str", "Name of the task, see docs/synthetics.md."),
        **{f"{split}": Entry("list", "Slices: `examples` and parameters of the task.") for split in ("train", "valid", "test")},
    },
}

# Dictionaries whose names are free, and why.
OPEN: dict[str, str] = {
    "synthetic": "parameters are those of the task, which names a wrong one itself",
    "scheduler.params": "of DeepSpeed's schedulers, which are refused",
    "autotuning.arg_mappings": "flags of other programs",
    "autotuning.model_info": "facts of a model",
    "checkpoint.parallel_write": "of DeepSpeed's writer",
    "config_files": "names of files",
    "comet_others": "what a user tells Comet",
    "deepspeed_extra_args": "entries that are keys are moved out, others are refused",
    "autotuning_config": "refused as a whole",
    "curriculum_learning": "refused as a whole",
    "sparse_attention": "refused as a whole",
    "sparsity_config": "refused as a whole",
    "data_efficiency": "refused as a whole",
    "elasticity": "refused as a whole",
    "compression_training": "refused as a whole",
    "soft_prompt_tuning": "refused as a whole",
}
