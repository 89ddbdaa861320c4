"""Derives unset keys from those that are set.

Each derived value has a provenance of the form `derived: why`, which `--print-config` shows. A wrong value derives nothing; the
rules report it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from megatron.config import pattern
from megatron.config.batch import BatchError, solve_batch
from megatron.config.problems import Problems
from megatron.config.schema import key_fields
from megatron.registry import layer_info, layer_names


@dataclass
class Draft:
    """Typed values of a future `RunConfig`, with the place or reason of each."""

    name: str
    values: dict[str, Any]
    provenance: dict[str, str]
    problems: Problems

    def get(self, key: str) -> Any:
        """The value of a key, or its default."""
        return self.values.get(key, key_fields()[key].default)

    def derive(self, key: str, value: Any, why: str) -> None:
        """Set an unset key."""
        self.values[key] = value
        self.provenance[key] = f"derived: {why}"

    def place(self, *keys: str) -> str:
        """`file:line` of the given keys; derived and default values have none."""
        places = [self.provenance[k] for k in keys if k in self.provenance]
        return ", ".join(dict.fromkeys(p for p in places if not p.startswith("derived")))

    def reject(self, message: str, *keys: str, hint: str = "") -> None:
        """Report a value from which nothing can be derived."""
        self.problems.add(message, self.place(*keys), hint)


def derive_all(draft: Draft, world_size: int | None) -> None:
    """Run every derivation; later ones use earlier ones."""
    steps: tuple[Callable[[Draft], None], ...] = (
        _lengths,
        _precision,
        _mixers,
        _documents,
        _tokenizer,
        _launcher,
        _generation,
        functools.partial(_world, world_size=world_size),
        _batch,
        _run_dir,
    )
    for step in steps:
        step(draft)


def _lengths(draft: Draft) -> None:
    if not draft.get("max_position_embeddings") and draft.get("seq_length"):
        draft.derive("max_position_embeddings", draft.get("seq_length"), "equals seq_length when unset")


def _precision(draft: Draft) -> None:
    switched = [name for section, name in (("fp16", "fp16"), ("bf16", "bfloat16")) if (draft.get(section) or {}).get("enabled")]
    if len(switched) > 1:
        draft.reject("fp16 and bf16 are both enabled", "fp16", "bf16", hint="keep one of them")
    elif not switched:
        if "precision" not in draft.values:
            draft.derive("precision", "fp32", "neither fp16 nor bf16 is enabled")
    elif "precision" not in draft.values:
        draft.derive("precision", switched[0], f"{'fp16' if switched[0] == 'fp16' else 'bf16'}.enabled is true")
    elif draft.values["precision"] != switched[0]:
        section = "fp16" if switched[0] == "fp16" else "bf16"
        message = f"precision is {draft.values['precision']}, but the section {section} is enabled"
        draft.reject(message, "precision", "fp16", "bf16", hint="remove one of them")


def _mixers(draft: Draft) -> None:
    """Positions and MLP form that go with the mixers."""
    try:
        types = pattern.expand(draft.get("attention_config"), draft.get("num_layers"))
    except pattern.PatternError as error:
        draft.reject(str(error), "attention_config", "num_layers", hint='for example [[["metala"], 24]]')
        return
    if not types:
        return
    if "pos_emb" not in draft.values and not pattern.POSITION_TYPES & set(types):
        draft.derive("pos_emb", "none", "no layer is softmax attention, order comes from the recurrence")
    if "mlp_type" not in draft.values and set(types) == {"metala"} and draft.get("activation") in ("silu", "swish"):
        draft.derive("mlp_type", "llama", "MetaLA's blocks have LLaMA's MLP; activation is silu")
    if "mlp_type" not in draft.values and set(types) == {"mamba"}:
        draft.derive("mlp_type", "none", "Mamba's blocks have no MLP")
    if "use_bias_in_mlp" not in draft.values and draft.get("mlp_type") == "llama":
        draft.derive("use_bias_in_mlp", False, "mlp_type llama has no biases in the released code")
    methods = [key for key in ("init_method", "output_layer_init_method") if key in draft.values]
    if "mixer_init" not in draft.values and "mamba" in types and methods:
        draft.derive("mixer_init", "methods", f"{methods[0]} is given and applies to every mixer, as in GPT-NeoX")
    if "num_attention_heads" not in draft.values and not any(uses_heads(name) for name in types):
        draft.derive("num_attention_heads", 1, "no layer has heads")


def uses_heads(layer_type: str) -> bool:
    """Does this mixer read the number of heads? An unknown one counts as such."""
    return layer_type not in layer_names() or layer_info(layer_type).uses_heads


def _documents(draft: Draft) -> None:
    if draft.get("reset_attention_at_eod") and "reset_state_at_eod" not in draft.values:
        draft.derive("reset_state_at_eod", True, "reset_attention_at_eod: document masking is the same for all mixers")


def _tokenizer(draft: Draft) -> None:
    vocab = draft.get("vocab_file")
    if "tokenizer_type" in draft.values or not vocab or draft.get("merge_file"):
        return
    if vocab.endswith(".json"):
        draft.derive("tokenizer_type", "HFTokenizer", "vocab_file is a JSON file and merge_file is unset")
    elif vocab.endswith(".model"):
        draft.derive("tokenizer_type", "SPMTokenizer", "vocab_file ends in .model")


def _launcher(draft: Draft) -> None:
    for key in ("deepspeed_slurm", "deepspeed_mpi"):
        if draft.get(key) and "force_multi" not in draft.values:
            draft.derive("force_multi", True, f"{key} needs the multi-node launcher")


def _generation(draft: Draft) -> None:
    if "text_gen_type" not in draft.values and draft.get("sample_input_file"):
        draft.derive("text_gen_type", "input-file", "sample_input_file is given")


def _world(draft: Draft, world_size: int | None) -> None:
    if world_size:
        draft.derive("world_size", world_size, "number of processes of the launcher")
    elif draft.get("global_num_gpus"):
        draft.derive("world_size", draft.get("global_num_gpus"), "global_num_gpus")
    else:
        draft.values.pop("world_size", None)


_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _batch(draft: Draft) -> None:
    """Solve for the batch sizes that are unset, once the world size is known."""
    cells = max(1, draft.get("pipe_parallel_size")) * max(1, draft.get("model_parallel_size"))
    context = draft.get("context_parallel_size")
    cells *= context
    world = draft.get("world_size")
    given = [draft.get(key) for key in _BATCH_KEYS]
    if not world or world % cells or not (given[0] or given[1]):
        return
    try:
        solved = solve_batch(world // cells, *given)
    except BatchError as error:
        kind = "model-parallel" if context == 1 else f"model-parallel and context-parallel ({context})"
        hint = f"world size {world} = {cells} {kind} x {world // cells} data-parallel; leave one size unset"
        draft.reject(str(error), *_BATCH_KEYS, hint=hint)
        return
    why = f"global batch = micro batch x accumulation steps x {world // cells} data-parallel ranks"
    for key, old, new in zip(_BATCH_KEYS, given, (solved.train, solved.micro, solved.accumulation), strict=True):
        if not old:
            draft.derive(key, new, why)


def _run_dir(draft: Draft) -> None:
    if draft.get("run_dir"):
        return
    save = PurePath(draft.get("save") or "")
    # `save: checkpoints` alone would make the working directory the run folder, so it needs a real parent.
    if save.name == "checkpoints" and save.parent != PurePath("."):
        draft.derive("run_dir", str(save.parent), "parent folder of save")
    else:
        draft.derive("run_dir", f"runs/{draft.name}", "runs/<name of the first config file>")
