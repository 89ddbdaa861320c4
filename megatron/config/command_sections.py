"""The sections of the commands around a training: logging, launching, generation, evaluation. See `run_sections.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.frozen import Names, Section, own


class LoggingSection(Section):
    """What a run logs, and where."""

    run_dir: str = own("", "Folder of the run: config, metrics, logs, plots. Unset: the parent of save, or runs/<config name>.")
    log_interval: int = Field(default=100, gt=0)
    log_dir: str | None = None
    tensorboard_dir: str | None = None
    use_wandb: bool | None = None
    wandb_group: str | None = None
    wandb_run_name: str | None = None
    wandb_team: str | None = None
    wandb_project: str = "neox"
    wandb_host: str = "https://api.wandb.ai"
    wandb_init_all_ranks: bool = False
    wandb_mode: Literal["online", "offline"] | None = own(
        None,
        "`offline`: W&B's files are written to the run folder, without an account or a network, and `wandb sync` uploads "
        "them later; `online`: they are uploaded. Unset: the variable WANDB_MODE decides.",
    )
    peak_theoretical_tflops: float | None = Field(default=None, gt=0)
    log_grad_norm: bool = False
    log_param_norm: bool = False
    log_grad_pct_zeros: bool = False
    log_optimizer_states: bool = False
    log_gradient_noise_scale: bool = False
    gradient_noise_scale_n_batches: int = Field(default=5, gt=0)
    gradient_noise_scale_cpu_offload: bool = False
    profile: bool = False
    profile_step_start: int = Field(default=10, ge=0)
    profile_step_stop: int = Field(default=12, ge=0)
    memory_profiling: bool = False
    memory_profiling_path: str | None = None


class LaunchSection(Section):
    """Options of NeoX's (DeepSpeed's) launcher."""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int = -1
    num_gpus: int | None = Field(default=None, gt=0)
    master_addr: str | None = None
    master_port: int = Field(default=29500, gt=0, lt=65536)
    launcher: Literal["pdsh", "openmpi", "mpich", "mvapich", "slurm", "torchrun", "none"] = "pdsh"
    launcher_args: str = own("", "More arguments for mpirun, srun or pdsh, as one string.")
    export_env: Names = own(
        (), "Names or patterns of environment variables to pass to every rank besides the usual ones; no secrets."
    )
    deepspeed_mpi: bool = False
    deepspeed_slurm: bool = False
    force_multi: bool = False
    no_ssh_check: bool = False
    comment: str | None = None
    account: str | None = None
    global_num_gpus: int | None = Field(default=None, gt=0)


class GenerationSection(Section):
    """Options of `generate.py`."""

    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] | None = None
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=0.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=0)
    maximum_tokens: int = Field(default=64, gt=0)
    prompt_end: str = "\n"
    sample_input_file: str | None = None
    sample_output_file: str = "samples.txt"
    num_samples: int = Field(default=1, gt=0)
    prompt_mode: Literal["plain", "left_pad", "read_twice"] = own(
        "plain",
        "How generate.py fills a prompt shorter than a JRT model's prefix: `plain` not at all, `left_pad` with masked "
        "spaces, `read_twice` with the prompt itself.",
    )
    recompute: bool = False
    return_logits: bool = False


class EvaluationSection(Section):
    """Options of `eval.py`."""

    eval_tasks: Names | None = None
    eval_results_prefix: str = ""
    eval_lengths: tuple[Annotated[int, Field(gt=0)], ...] | None = own(
        None,
        "Lengths in tokens. perplexity: of a pass (unset: seq_length); perplexity_by_length: ends of the position buckets "
        "(unset: seq_length / 4 to seq_length x 16); needle tasks: of prompt and answer (unset: 1,024 to 65,536).",
    )
    eval_stride: int | None = own(
        None, "Tokens scored per pass of a sliding evaluation; unset: the length (non-overlapping).", gt=0
    )
    eval_split: Literal["train", "valid", "test"] = own("valid", "The data split to score: train, valid or test.")
    eval_limit: int | None = own(
        None,
        "perplexity: score only the first N tokens; perplexity_by_length: N documents; lm-eval tasks: N examples of each; "
        "needle tasks: N examples of each length and depth (unset: 4).",
        gt=0,
    )
    eval_depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = own(
        None, "Needle tasks: depths of the needle, from 0 (start) to 1 (end); unset: 0, 0.25, 0.5, 0.75 and 1."
    )
    eval_text: str | None = own(
        None,
        "A text file, or a .jsonl file with a document per row, instead of the data split: the documents of "
        "perplexity_by_length, and the haystack of needle tasks.",
    )
    eval_batch_size: int = own(8, "Rows per pass of lm-eval tasks; scores do not depend on it.", gt=0)
    eval_max_length: int | None = own(None, "Longest context that the model reads in lm-eval tasks; unset: seq_length.", gt=1)
    eval_num_fewshot: int | None = own(None, "Few-shot examples of lm-eval tasks; unset: the task's own number.", ge=0)
    eval_data_dir: str | None = own(None, "Folder of local datasets for lm-eval tasks, each under its hub name.")
    eval_context_length: int = own(
        1000, "Recall tasks: tokens of document and answer (50); the document is cropped around its answer; 0: no limit.", ge=0
    )
    eval_prefix_scope: Literal["context", "whole"] = own(
        "context", "JRT models: the prefix is the prompt (context) or also the scored text (whole, as released)."
    )
    eval_stop_at_eod: bool = own(
        True, "Generation in lm-eval tasks stops at an end of document; the released Based and JRT code does not stop."
    )
