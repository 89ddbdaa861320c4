"""The sections of a training run: mesh, optimizer, schedule, batch, precision, training, data, checkpoints, reliability.

Field names are flat keys. NeoX's are documented in `neox_keys.tsv`, ours (`own`) beside the field. Values inside a dictionary,
such as the learning rate in `optimizer`, are properties.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron.config.frozen import Names, Options, Section, own
from megatron.reliability.guard_options import MIN_SPIKE_WINDOW, BudgetPolicy, GuardOptions
from megatron.reliability.signals import DEFAULT_SIGNALS

# PyTorch's and DeepSpeed's names of number formats -> the names of `precision`.
DTYPE_NAMES = {
    "fp32": "fp32", "float32": "fp32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "fp16", "float16": "fp16",
}  # fmt: skip
TokenizerType = Literal[
    "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer",
]  # fmt: skip
_MOST_SAMPLES = 1 << 24  # of one step
# All of them are decoupled AdamW, computed by different libraries.
_ADAM = ("adam", "adamw", "fusedadam", "torch_adam")


class ParallelSection(Section):
    """The mesh: pipeline x data x context x tensor, and what ZeRO shards. `world_size` 0 means not known yet."""

    pipe_parallel_size: int = Field(default=0, ge=0)
    model_parallel_size: int = Field(default=1, ge=0)
    sequence_parallel: bool = False
    zero_optimization: Options | None = None
    pipe_partition_method: str = "type:transformer|mlp"
    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    engine: Literal["auto", "deepspeed", "single"] = own(
        "auto", "`deepspeed`, `single` (plain PyTorch, one process), or `auto`."
    )
    context_parallel_size: int = own(
        1,
        "Ranks among which every sequence is split into contiguous shards; they exchange recurrent states instead of tokens. "
        "For sequences that do not fit on one device, or fewer sequences than devices; docs/guides/long-sequences.md.",
        ge=1,
    )
    context_parallel_exchange: Literal["all_gather", "scan"] = own(
        "all_gather",
        "How context-parallel ranks exchange states: `all_gather`, one collective; `scan`, log2(ranks) rounds between "
        "neighbours, which send less from 8 ranks on and wait longer.",
    )
    world_size: int = Field(default=0, ge=0)

    @property
    def zero_stage(self) -> int:
        """`zero_optimization.stage`; 0 if unset (or a list of stages for NeoX's autotuner, which is refused)."""
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
        """Replicas of the model, context-parallel ranks included; 0 while the world size is not known."""
        return self.world_size // (self.pipe_stages * self.tensor_ranks)

    @property
    def model_processes(self) -> int:
        """Processes that a sequence needs: the stages, tensor-parallel and context-parallel ranks of one batch."""
        return self.pipe_stages * self.tensor_ranks * self.context_parallel_size


class OptimizerSection(Section):
    """The optimizer. NeoX's `Adam` with the top-level `weight_decay` means AdamW."""

    optimizer: Options = Field(default_factory=lambda: {"type": "Adam", "params": {"lr": 1e-3}})
    weight_decay: float = Field(default=0.1, ge=0)
    weight_decay_rule: Literal["neox", "metala", "based"] = own(
        "neox",
        "Which parameters decay: `neox`, all but biases, norms and what a mixer exempts (Mamba's A, D, MetaLA's "
        "aug_balance); `metala`, the same and aug_balance, as in MetaLA's released code; `based`, all but biases and the "
        "embedding, gains of norms included, as Based and JRT were trained.",
    )
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
    warmup_start_lr: float | None = own(
        None,
        "Learning rate of the first step; the warm-up rises linearly from it (as in timm). Unset: NeoX's warm-up, from near 0.",
        ge=0,
    )
    override_lr_scheduler: bool = False
    use_checkpoint_lr_scheduler: bool = False


class BatchSection(Section):
    """Batch sizes in sequences. All three are derived once the world size is known; 0 means not known yet."""

    train_batch_size: int = Field(default=0, ge=0, le=_MOST_SAMPLES)
    train_micro_batch_size_per_gpu: int = Field(default=0, ge=0, le=_MOST_SAMPLES)
    gradient_accumulation_steps: int = Field(default=0, ge=0, le=_MOST_SAMPLES)


class PrecisionSection(Section):
    """The dtype of the forward and backward pass, and of gradient accumulation."""

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
        """The dtype of gradient accumulation: `data_types.grad_accum_dtype`, else fp32."""
        name = str((self.data_types or {}).get("grad_accum_dtype") or "fp32").lower()
        return DTYPE_NAMES.get(name, name)


class TrainingSection(Section):
    """Length of the training, evaluation, objective, and what happens between forward and backward."""

    train_iters: int = Field(default=0, ge=0)
    train_epochs: int | None = Field(default=None, gt=0)
    eval_iters: int = Field(default=100, ge=0)
    eval_interval: int = Field(default=1000, ge=0)
    exit_interval: int | None = Field(default=None, gt=0)
    seed: int = Field(default=1234, gt=0)
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = Field(default=1, gt=0)
    eod_mask_loss: bool = False
    reset_state_at_eod: bool = own(
        False,
        "Document masking in every mixer: recurrent state, short convolutions, attention and learned positions reset after "
        "each end of document.",
    )
    reset_attention_at_eod: bool = own(False, "The name that users of attention look for: it sets reset_state_at_eod.")
    objective: Literal["causal", "prefix", "jrt"] = own(
        "causal",
        "`causal`: the next token everywhere; `prefix`: only after the prefix; `jrt`: that and masked tokens of the prefix.",
    )
    objective_prefix_length: int | None = own(None, "Tokens in the prefix of `objective`; unset: jrt_prefix_length.", gt=0)
    objective_masked_weight: float = own(0.25, "Weight of the mean loss over masked tokens in objective jrt.", ge=0)
    objective_mask_rate: float = own(0.15, "Share of the prefix's tokens that objective jrt masks.", gt=0, lt=1)
    objective_mask_token: int | None = own(None, "Token id of the mask; unset: the last row of the padded vocabulary.", ge=0)
    loss_mean_over: Literal["global_batch", "micro_batch"] = own(
        "global_batch",
        "What the loss is averaged over: the counted tokens of the `global_batch`, however they fall on micro batches and "
        "ranks, or each `micro_batch` by itself, whose means are averaged (as in GPT-NeoX). They differ where tokens are "
        "masked.",
    )
    kernel_backend: Literal["auto", "reference", "torch", "triton", "fla"] = own(
        "auto", "Which implementation of the mixers' kernels runs; `auto` picks the fastest that works on this machine."
    )
    loss_chunk_tokens: int = own(
        0,
        "Compute output logits and their loss for N tokens at a time, so that the logits of a micro batch never exist "
        "as a whole; 0: all at once.",
        ge=0,
    )


class DataSection(Section):
    """Which token files are read, and how they are split and packed into samples."""

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
    train_stream: Names | None = own(
        None,
        "Files, folders or `hf:NAME?split=train`, read and tokenised during training instead of data_path; a resumed run "
        "continues where it stopped.",
    )
    valid_stream: Names | None = own(None, "The same for validation.")
    test_stream: Names | None = own(None, "The same for the final test.")
    stream_key: str = own("text", "Field of a record that holds its text.")
    stream_repeat: bool = own(True, "Restart a stream that ends before train_iters.")
    synthetic: Options | None = own(
        None,
        "A synthetic task instead of data_path: `task`, parameters of all its slices, and `train`, `valid`, `test`: lists of"
        " slices with `examples` and more parameters; docs/synthetics.md. Validation then logs the accuracy.",
    )
    mmap_warmup: bool = False
    num_workers: int = Field(default=2, ge=0, le=1024)
    use_shared_fs: bool = True


class TokenizerSection(Section):
    """The tokenizer of the data, also used for generation and export."""

    tokenizer_type: TokenizerType = "GPT2BPETokenizer"
    vocab_file: str | None = None
    merge_file: str | None = None
    padded_vocab_size: int | None = Field(default=None, gt=0, le=1 << 24)


class CheckpointSection(Section):
    """What is saved where and when, and what is loaded."""

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
    async_save: bool = own(
        False, "Copy the state to host memory and write it in the background; the next save and the end of the run wait for it."
    )
    verify_checkpoint: bool = own(
        True,
        "Verify the SHA-256 of every file that is loaded, and fall back to the checkpoint before a damaged one (never with "
        "`iteration`).",
    )


class ReliabilitySection(Section):
    """Signals and time limits, skipped steps, and hanging ranks."""

    time_limit: str | int | float | None = own(
        None,
        "Save and exit with code 75 before this much time has passed since the start: `3:50:00`, `45:00`, seconds, or "
        "Slurm's `1-06:00:00`.",
    )
    exit_signals: Names = own(
        DEFAULT_SIGNALS,
        "Signals on which all ranks save and exit with code 75 at the same step; a second signal exits at once with 128 + "
        "its number.",
    )
    skip_budget: int = own(
        GuardOptions.budget,
        "Steps within skip_window that may be skipped because their loss or gradient norm was not finite or a spike; a"
        " skipped step leaves weights, optimizer and schedule unchanged.",
        ge=0,
    )
    skip_window: int = own(GuardOptions.window, "Length in steps of the window of skip_budget.", gt=0)
    on_skip_budget: BudgetPolicy = own(
        GuardOptions.on_budget,
        "When skip_budget is exhausted: `stop` with exit code 7, or `rewind` to the last checkpoint and continue after the "
        "bad samples.",
    )
    spike_sigma: float = own(
        GuardOptions.spike_sigma,
        "Skip a step whose loss or gradient norm is this many standard deviations above the mean of the last "
        "spike_window applied steps; 0 is off, 6 is usual.",
        ge=0,
    )
    spike_window: int = own(
        GuardOptions.spike_window,
        "Applied steps over which spike_sigma takes mean and standard deviation.",
        ge=MIN_SPIKE_WINDOW,
    )
    hang_timeout: float = own(
        1800.0,
        "Seconds after which a rank that hangs or is silent is named and all ranks exit with code 21 (hang) or 22 "
        "(lost); ten times as long until the first step is done. 0 is off.",
        ge=0,
    )
