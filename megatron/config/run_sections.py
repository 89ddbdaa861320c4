"""The sections that say how to run: mesh, optimizer, schedule, batch, precision, training length, data, checkpoints.

Field names are NeoX's flat keys (ours are marked in `own_keys.py`). Values that follow from a dictionary key, such as
the learning rate inside `optimizer`, are properties.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron.config.base import Names, Options, Section

# PyTorch's and DeepSpeed's names of number formats -> the names of `precision`.
DTYPE_NAMES = {
    "fp32": "fp32",
    "float32": "fp32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "fp16",
    "float16": "fp16",
}
_MOST_SAMPLES = 1 << 24  # of one step
# Every one of these is decoupled AdamW in the end; the names differ in which library computes it.
_ADAM = ("adam", "adamw", "fusedadam", "torch_adam")


class ParallelSection(Section):
    """The mesh: pipeline x tensor x data, and what ZeRO cuts. `world_size` 0 means not known yet."""

    pipe_parallel_size: int = Field(default=0, ge=0)
    model_parallel_size: int = Field(default=1, ge=0)
    sequence_parallel: bool = False
    zero_optimization: Options | None = None
    pipe_partition_method: str = "type:transformer|mlp"
    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    engine: Literal["auto", "deepspeed", "single"] = "auto"
    world_size: int = Field(default=0, ge=0)

    @property
    def zero_stage(self) -> int:
        """`zero_optimization.stage`; 0 when unset (or a list of stages for NeoX's autotuner, which is refused)."""
        stage = (self.zero_optimization or {}).get("stage", 0)
        return stage if isinstance(stage, int) else 0

    @property
    def pipe_stages(self) -> int:
        """Pipeline stages: `pipe_parallel_size`, where NeoX's 0 means one."""
        return max(1, self.pipe_parallel_size)

    @property
    def tensor_ranks(self) -> int:
        """Tensor-parallel ranks: `model_parallel_size`, where 0 means one."""
        return max(1, self.model_parallel_size)

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks; 0 while the world size is not known."""
        return self.world_size // (self.pipe_stages * self.tensor_ranks)


class OptimizerSection(Section):
    """The optimizer. NeoX's `Adam` with the top-level `weight_decay` means AdamW."""

    optimizer: Options = Field(default_factory=lambda: {"type": "Adam", "params": {"lr": 1e-3}})
    weight_decay: float = Field(default=0.1, ge=0)
    weight_decay_rule: Literal["neox", "metala", "based"] = "neox"
    gradient_clipping: float = Field(default=1.0, ge=0)
    fp32_allreduce: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """`optimizer.params`, empty if absent."""
        return self.optimizer.get("params") or {}

    @property
    def optimizer_type(self) -> str:
        """`optimizer.type` in lower case; NeoX's `adam` is `adamw`."""
        name = str(self.optimizer.get("type", "adam")).lower()
        return "adamw" if name in _ADAM else name

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return float(self.params.get("lr", 0.0))

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's two decay rates."""
        first, second = self.params.get("betas", (0.9, 0.999))
        return float(first), float(second)

    @property
    def eps(self) -> float:
        """Adam's epsilon."""
        return float(self.params.get("eps", 1e-8))


class ScheduleSection(Section):
    """The learning-rate curve; the formula lives in the engine."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    lr_decay_iters: int | None = Field(default=None, ge=0)
    lr_decay_fraction: float | None = Field(default=None, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.01, ge=0)
    warmup_start_lr: float | None = Field(default=None, ge=0)
    override_lr_scheduler: bool = False
    use_checkpoint_lr_scheduler: bool = False


class BatchSection(Section):
    """Batch sizes in sequences. All three are filled in when the world size is known; 0 means not known yet."""

    train_batch_size: int = Field(default=0, ge=0, le=_MOST_SAMPLES)
    train_micro_batch_size_per_gpu: int = Field(default=0, ge=0, le=_MOST_SAMPLES)
    gradient_accumulation_steps: int = Field(default=0, ge=0, le=_MOST_SAMPLES)


class PrecisionSection(Section):
    """The number format of the forward and backward pass, and of the gradient sum."""

    fp16: Options | None = None
    bf16: Options | None = None
    precision: Literal["fp16", "fp32", "bfloat16"] = "fp32"
    data_types: Options | None = None

    @property
    def dtype(self) -> str:
        """`fp32`, `bfloat16` or `fp16`."""
        return self.precision

    @property
    def grad_accum_dtype(self) -> str:
        """The format in which gradients are summed: `data_types.grad_accum_dtype`, else fp32."""
        name = str((self.data_types or {}).get("grad_accum_dtype") or "fp32").lower()
        return DTYPE_NAMES.get(name, name)


class TrainingSection(Section):
    """How long to train, when to evaluate, and what happens between forward and backward."""

    train_iters: int = Field(default=0, ge=0)
    train_epochs: int | None = Field(default=None, gt=0)
    eval_iters: int = Field(default=100, ge=0)
    eval_interval: int = Field(default=1000, ge=0)
    exit_interval: int | None = Field(default=None, gt=0)
    seed: int = Field(default=1234, gt=0)
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = Field(default=1, gt=0)
    eod_mask_loss: bool = False
    reset_state_at_eod: bool = False
    reset_attention_at_eod: bool = False
    objective: Literal["causal", "prefix", "jrt"] = "causal"
    objective_prefix_length: int | None = Field(default=None, gt=0)
    objective_masked_weight: float = Field(default=0.25, ge=0)
    objective_mask_rate: float = Field(default=0.15, gt=0, lt=1)
    objective_mask_token: int | None = Field(default=None, ge=0)
    loss_mean_over: Literal["global_batch", "micro_batch"] = "global_batch"
    kernel_backend: Literal["auto", "reference", "torch", "triton", "fla"] = "auto"
    loss_chunk_tokens: int = Field(default=0, ge=0)


class DataSection(Section):
    """Which token files are read, how they are split and cut into samples."""

    data_path: str | None = None
    train_data_paths: Names | None = None
    valid_data_paths: Names | None = None
    test_data_paths: Names | None = None
    train_label_data_paths: Names | None = None
    valid_label_data_paths: Names | None = None
    test_label_data_paths: Names | None = None
    train_data_weights: tuple[float, ...] | None = None
    valid_data_weights: tuple[float, ...] | None = None
    test_data_weights: tuple[float, ...] | None = None
    weight_by_num_documents: bool = False
    weighted_sampler_alpha: float = 1.0
    split: str = "969, 30, 1"
    data_impl: Literal["infer", "mmap", "cached"] = "infer"
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    dataset_impl: Literal["gpt2", "pairwise", "online"] = "gpt2"
    allow_chopped: bool = True
    train_stream: Names | None = None
    valid_stream: Names | None = None
    test_stream: Names | None = None
    stream_key: str = "text"
    stream_repeat: bool = True
    synthetic: Options | None = None
    mmap_warmup: bool = False
    num_workers: int = Field(default=2, ge=0, le=1024)
    use_shared_fs: bool = True


class TokenizerSection(Section):
    """The tokenizer that made the data, which is also the one used for generation and export."""

    tokenizer_type: Literal[
        "GPT2BPETokenizer",
        "HFTokenizer",
        "HFGPT2Tokenizer",
        "SPMTokenizer",
        "CharLevelTokenizer",
        "TiktokenTokenizer",
    ] = "GPT2BPETokenizer"
    vocab_file: str | None = None
    merge_file: str | None = None
    padded_vocab_size: int | None = Field(default=None, gt=0, le=1 << 24)


class CheckpointSection(Section):
    """Where and when to save, and what to load."""

    save: str | None = None
    load: str | None = None
    checkpoint_factor: int | float | None = Field(default=None, gt=0)
    checkpoint_scale: Literal["linear", "log"] = "linear"
    extra_save_iters: tuple[int, ...] | None = None
    keep_last_n_checkpoints: int | None = Field(default=None, gt=0)
    iteration: int | None = Field(default=None, ge=0)
    finetune: bool = False
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_optim: bool = False
    no_save_rng: bool = False
    async_save: bool = False
    verify_checkpoint: bool = True
