"""The dictionary that DeepSpeed is configured with, as a pure function that does not need DeepSpeed."""

from __future__ import annotations

from typing import Any

from megatron.engine.base import EngineSettings
from megatron.errors import ConfigError
from megatron.parallel.mesh import Mesh

_FP16_KEYS = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
# DeepSpeed allocates the whole bucket at every step; its default of 5e8 elements is 2 GB however small the model is.
LARGEST_BUCKET = 500_000_000


def check_zero_stage(stage: int, pipeline: int) -> None:
    """Raise ConfigError for ZeRO stages that do not exist, or that DeepSpeed's pipeline engine cannot run."""
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"there is no ZeRO stage {stage}", hint='"zero_optimization": {"stage": 1}')
    if stage > 1 and pipeline > 1:
        raise ConfigError(
            f"zero_optimization.stage {stage} does not go together with pipe_parallel_size {pipeline}",
            why="a pipeline adds up gradients over its micro batches, which these stages have already partitioned",
            hint='"zero_optimization": {"stage": 1}, or pipe_parallel_size: 1',
        )


def zero_stage_note(settings: EngineSettings) -> str:
    """Why the ZeRO stage differs from the configured one; empty if it does not."""
    if settings.zero_stage:
        return ""
    return "ZeRO stage 0 runs as stage 1: the same mathematics, and DeepSpeed 0.19.8 clips wrongly at stage 0 with pipelines"


def deepspeed_config(settings: EngineSettings, mesh: Mesh, on_accelerator: bool, local_params: int) -> dict[str, Any]:
    """Settings -> DeepSpeed's dictionary.

    Args:
        settings: settings of the engine.
        mesh: the mesh, whose data-parallel and pipeline-parallel sizes are used.
        on_accelerator: false on a CPU, where DeepSpeed has no fp16.
        local_params: number of parameters on this rank, the largest useful bucket.

    Raises:
        ConfigError: ZeRO stage 2 or 3 with a pipeline, or fp16 on a CPU.
    """
    check_zero_stage(settings.zero_stage, mesh.pp)
    if settings.dtype == "fp16" and not on_accelerator:
        raise ConfigError("DeepSpeed has no fp16 on a CPU", hint="precision: fp32 or bfloat16, or engine: single")
    micro, count = settings.micro_batch, settings.gradient_accumulation
    config: dict[str, Any] = {
        "train_batch_size": micro * count * mesh.dp,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": count,
        "gradient_clipping": settings.gradient_clipping,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Our own object is passed, never a name: DeepSpeed's Adam would compile C++ at start.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": max(settings.zero_stage, 1),
            "reduce_bucket_size": min(max(local_params, 1), LARGEST_BUCKET),
        },
        # Recomputation is done in `engine/stages.py`, non-reentrant; DeepSpeed's own stays off.
        # Whole activations go to the next stage: the partitioned form adds collectives and unwraps one-tensor tuples.
        "pipeline": {
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
    }
    if settings.dtype == "fp16":
        config["fp16"] = {"enabled": True, **{k: settings.fp16[k] for k in _FP16_KEYS if k in settings.fp16}}
    elif settings.dtype != "fp32":
        config["bf16"] = {"enabled": True}
        if settings.fp32_grad_accum:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
