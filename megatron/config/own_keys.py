"""The keys that GPT-NeoX does not have: ours, and a few that only older NeoX files use.

Kept apart from `neox_keys.py` so that the compatibility promise and our additions are never mixed up.
"""

from __future__ import annotations

# key -> one sentence of documentation; type and default are those of its section.
OWN_KEYS: dict[str, str] = {
    "mlp_branch_size": "Width of one MLP branch, said directly; beats every other width rule.",
    "mlp_type": (
        "`regular`: NeoX's MLP, gated if the activation is; `llama`: act(x W1) * (x W3) W2 whose width is "
        "intermediate_size, else 8/3 of hidden_size rounded up to 256; `none`: blocks are a mixer alone. "
        "Unset, metala layers with activation silu take llama, mamba layers none."
    ),
    "residual_fp32": "Keep the residual stream between blocks in fp32 whatever the weights are in.",
    "warmup_start_lr": "Rate of the first step; the warm-up climbs from it in a line (timm). Unset: NeoX's, from near 0.",
    "weight_decay_rule": (
        "Which parameters decay: `neox`, all but biases, norms and what a mixer exempts (Mamba's A, D, MetaLA's aug_balance); "
        "`metala`, the same but aug_balance too, as in MetaLA's released code; `based`, all but biases and the embedding, so "
        "gains of norms too, as Based and JRT were trained."
    ),
    "objective": (
        "`causal`: the next token everywhere; `prefix`: after the prefix alone; `jrt`: that and hidden tokens of the prefix."
    ),
    "objective_prefix_length": "Tokens of the prefix of `objective`; unset: jrt_prefix_length.",
    "objective_masked_weight": "Weight of the masked tokens' mean loss in objective jrt.",
    "prompt_mode": (
        "How generate.py fills a prompt shorter than a JRT model's prefix: `plain` not at all, `left_pad` with hidden spaces, "
        "`read_twice` with the prompt itself."
    ),
    "objective_mask_rate": "Share of the prefix's tokens that objective jrt hides.",
    "objective_mask_token": "Id that stands for a hidden token; unset: the last row of the padded vocabulary.",
    "loss_mean_over": (
        "What the loss is a mean over: the counted tokens of the `global_batch`, whatever micro batches and ranks hold them, "
        "or, as in GPT-NeoX, each `micro_batch` by itself, whose means are averaged. They differ where tokens are masked."
    ),
    "mixer_init": (
        "How mixers with a rule of their own for initial values (mamba: PyTorch's uniform rule) are drawn: `own`, by it; "
        "`methods`, by init_method and output_layer_init_method as in GPT-NeoX. Unset: methods where one of those two is given."
    ),
    "simplermsnorm_epsilon": "Epsilon of `norm: simplermsnorm`, MetaLA's RMSNorm without a gain.",
    "embedding_norm": "A norm of the kind `norm` after the embedding, as in Bloom.",
    "embedding_scale": "Multiply embeddings by the square root of hidden_size.",
    "eval_lengths": "Lengths at which `eval.py --eval_tasks perplexity` reads the text; unset: seq_length alone.",
    "eval_stride": "Tokens scored per pass of a sliding evaluation; unset: the length (non-overlapping).",
    "eval_split": "The split of the data that is scored: train, valid or test.",
    "eval_limit": "perplexity: score the first so many tokens only; tasks of lm-eval: so many examples of each.",
    "eval_batch_size": "Rows per pass of lm-eval tasks; scores do not depend on it.",
    "eval_max_length": "Tokens that lm-eval tasks let the model read at most; unset: seq_length.",
    "eval_num_fewshot": "Examples in front of each question of lm-eval tasks; unset: what the task says.",
    "eval_data_dir": "Folder of local data sets for lm-eval tasks, each under its hub name.",
    "eval_context_length": "Recall tasks: tokens for document and answer (50), the document cut around its answer; 0: no cut.",
    "eval_prefix_scope": "JRT models: the prefix is the prompt (context) or also the scored text (whole, as released).",
    "eval_stop_at_eod": "Generation of lm-eval tasks ends at an end of document; the released Based and JRT code goes on.",
    "engine": "`deepspeed`, `single` (plain PyTorch, one process), or `auto`.",
    "reset_state_at_eod": (
        "Keep documents apart in every mixer: recurrent state, short convolutions, attention and learned positions start anew "
        "after each end of document."
    ),
    "reset_attention_at_eod": "The same under the name a user of attention looks for: it sets reset_state_at_eod.",
    "train_stream": (
        "Files, folders or `hf:NAME?split=train`, read and tokenised while training instead of data_path; resumes in place."
    ),
    "valid_stream": "The same for validation.",
    "test_stream": "The same for the final test.",
    "stream_key": "Field of a record that holds the text of a stream.",
    "stream_repeat": "Start a stream over when it ends before train_iters.",
    "synthetic": (
        "A synthetic task instead of data_path: `task`, parameters of all its slices, and `train`, `valid`, `test`, lists of "
        "slices with `examples` and more parameters; docs/synthetics.md. Validation then logs the share of right answers."
    ),
    "kernel_backend": "Which implementation of the mixers' kernels runs; `auto` picks the fastest that works here.",
    "loss_chunk_tokens": (
        "Form output logits and their loss for so many tokens at a time, so that the logits of a micro batch never exist as a "
        "whole; 0: all at once."
    ),
    "async_save": "Copy the state to host memory and write it in the background; the next save and the end of the run wait.",
    "verify_checkpoint": (
        "Compare the SHA-256 of what is loaded, and fall back to the checkpoint before it when a file is damaged "
        "(never with `iteration`)."
    ),
    "time_limit": (
        "Leave, with the work saved, before this much time is over since the start: `3:50:00`, `45:00`, seconds, or Slurm's "
        "`1-06:00:00`. Exit code 75."
    ),
    "exit_signals": (
        "Signals that make all ranks save and leave at one step with exit code 75; a second one leaves at once "
        "with 128 + its number."
    ),
    "skip_budget": (
        "Steps that may be skipped within skip_window, because their loss or gradient norm was not finite or a spike; "
        "skipping leaves weights, optimizer and schedule as they were."
    ),
    "skip_window": "Length in steps of the window that skip_budget counts in.",
    "on_skip_budget": (
        "When the budget is spent: `stop` with exit code 7, or `rewind` to the last checkpoint and go on behind the bad "
        "samples."
    ),
    "spike_sigma": (
        "Skip a step whose loss or gradient norm is this many standard deviations above the mean of the last spike_window "
        "steps; 0 is off, 6 is usual."
    ),
    "spike_window": "Steps that spike_sigma takes its mean and spread from.",
    "hang_timeout": (
        "Seconds after which a rank that stands still or is silent is named and all end with exit code 21 (hangs) or "
        "22 (lost); ten times as long until the first step is done. 0 is off."
    ),
    "launcher_args": "More arguments for mpirun, srun or pdsh, as one string.",
    "export_env": "Names or patterns of environment variables that go to every rank beside the usual ones; no secrets.",
    "wandb_mode": (
        "`offline`: W&B's files are written to the run folder, without an account or a network, and `wandb sync` sends them "
        "later; "
        "`online`: they are sent. Unset: as the variable WANDB_MODE says."
    ),
    "run_dir": "Folder of the run: config, metrics, logs, plots. Unset: the parent of save, or runs/<config name>.",
}

# Values of implemented keys that are not built: key -> value -> why and what to use.
REFUSED_VALUES: dict[str, dict[str | bool, str]] = {
    "pos_emb": {
        "sinusoidal": "sinusoidal positions are not built (NeoX's are broken); use learned, rotary or alibi",
        "rpe": "the T5 position bias is not built; use alibi, rotary or learned",
    },
    "norm": {
        "scalenorm": "ScaleNorm is not built; use rmsnorm or simplermsnorm",
        "te_rmsnorm": "Transformer Engine is not supported; use rmsnorm",
        "te_layernorm": "Transformer Engine is not supported; use layernorm",
    },
    "launcher": {"mvapich": "MVAPICH is not supported; use pdsh, openmpi, mpich or slurm"},
    "dataset_impl": {
        "pairwise": "preference and reward training is not built",
        "online": "online training is not built",
    },
    "text_gen_type": {"precompute": "preference and reward training is not built"},
}
