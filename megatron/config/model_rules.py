"""Cross rules of the model's shape: keys that are missing, sizes that must divide, keys that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator

from megatron import registry
from megatron.config.derive import uses_heads
from megatron.config.model_section import GATED
from megatron.config.pattern import PatternError
from megatron.config.problems import Violation
from megatron.config.schema import RunConfig

_ATTENTION_KEYS = ("num_kv_heads", "sliding_window_width", "use_qk_layernorm", "attention_dropout")
_REQUIRED = {
    "num_layers": "write num_layers: the number of blocks",
    "hidden_size": "write hidden_size: the width of the model",
    "num_attention_heads": "MetaLA's released models have heads of width 128: hidden_size / 128",
    "seq_length": "write seq_length: the tokens of a training sample",
}


def missing_sizes(run: RunConfig) -> Iterator[Violation]:
    """Sizes without which there is no model."""
    for key, hint in _REQUIRED.items():
        if not run.get(key):
            yield Violation((key,), f"{key} is not given", hint, missing=True)


def sizes_that_divide(run: RunConfig) -> Iterator[Violation]:
    """Sizes that must be multiples of one another, or not below one another."""
    m, tensor = run.model, run.parallel.tensor_ranks
    own_heads = not _uses_model_heads(run)
    mlp_keys = ("intermediate_size", "mlp_branch_size", "hidden_size")
    rows = (
        (("hidden_size",), m.hidden_size, "num_attention_heads", 1 if own_heads else m.num_attention_heads,
         "every head needs the same whole width"),
        (("num_attention_heads",), 0 if own_heads else m.num_attention_heads, "model_parallel_size", tensor,
         "mixers are sharded by head; choose a divisor of the head count"),
        (mlp_keys, m.mlp_width, "model_parallel_size", tensor,
         "set mlp_branch_size, or mlp_multiple_of to model_parallel_size"),
        (("num_attention_heads",), m.num_attention_heads, "num_kv_heads", m.num_kv_heads,
         "each key/value head serves the same number of query heads"),
        (("num_kv_heads",), m.num_kv_heads, "model_parallel_size", tensor,
         "attention is sharded by key/value head; choose a divisor of num_kv_heads"),
        (("padded_vocab_size",), run.tokenizer.padded_vocab_size, "model_parallel_size", tensor,
         "leave it unset: it follows the tokenizer"),
    )  # fmt: skip
    for keys, size, divisor_key, divisor, hint in rows:
        if (size or 0) % (divisor or 1):
            name = "the MLP width" if keys == mlp_keys else keys[0]
            yield Violation((*keys, divisor_key), f"{name} {size} is not a multiple of {divisor_key} {divisor}", hint)
    if 0 < m.num_layers < run.parallel.pipe_stages:
        message = f"num_layers {m.num_layers} is less than pipe_parallel_size {run.parallel.pipe_stages}"
        yield Violation(("num_layers", "pipe_parallel_size"), message, "every pipeline stage needs at least one block")
    if m.max_position_embeddings < m.seq_length:
        message = f"max_position_embeddings {m.max_position_embeddings} is less than seq_length {m.seq_length}"
        hint = "leave max_position_embeddings unset: it follows seq_length"
        yield Violation(("max_position_embeddings", "seq_length"), message, hint)


def contradictions(run: RunConfig) -> Iterator[Violation]:
    """Keys of the model that cannot stand together."""
    m, t = run.model, run.training
    if m.intermediate_size and m.expansion_factor:
        message = "intermediate_size and expansion_factor are both given"
        yield Violation(("intermediate_size", "expansion_factor"), message, "keep one of them")
    if m.mlp_branch_size and (m.intermediate_size or m.expansion_factor):
        keys = ("mlp_branch_size", "intermediate_size", "expansion_factor")
        message = "mlp_branch_size sets the MLP width, and so does intermediate_size or expansion_factor"
        yield Violation(keys, message, "keep mlp_branch_size alone")
    if m.mlp_type == "llama" and m.activation in GATED:
        message = f"mlp_type: llama takes a pointwise activation, not {m.activation}"
        yield Violation(("mlp_type", "activation"), message, "write activation: silu (mlp_type llama is gated already)")
    if unread := _unread_attention_keys(run):
        message = f"{', '.join(f'{key}: {run.get(key)}' for key in unread)}: no layer of attention_config reads this"
        hint = "it belongs to softmax attention (global, flash); recurrent mixers need no positions: pos_emb: none"
        yield Violation(("pos_emb", *_ATTENTION_KEYS), message, hint)
    if m.gpt_j_tied and not m.gpt_j_residual:
        hint = "write gpt_j_residual: true, or remove gpt_j_tied"
        yield Violation(("gpt_j_tied", "gpt_j_residual"), "gpt_j_tied has no meaning without gpt_j_residual", hint)
    if m.bias_gelu_fusion and m.activation != "gelu":
        message = f"bias_gelu_fusion goes with activation: gelu, not {m.activation}"
        yield Violation(("bias_gelu_fusion", "activation"), message, "remove bias_gelu_fusion")
    if t.reset_attention_at_eod and not t.reset_state_at_eod:
        message = "reset_attention_at_eod is true and reset_state_at_eod is false"
        hint = "document masking is the same for all mixers: set one of them and leave the other unset"
        yield Violation(("reset_attention_at_eod", "reset_state_at_eod"), message, hint)
    if t.reset_state_at_eod and (shrinking := _slopes_of_whole_rows(run)):
        message = f"{', '.join(shrinking)}: slopes that shrink with a row's length cannot be combined with document masking"
        hint = "reset_state_at_eod: false, or a fixed interpolation: alibi_slope_factor"
        yield Violation((*shrinking, "reset_state_at_eod"), message, hint)


def _slopes_of_whole_rows(run: RunConfig) -> list[str]:
    """Keys by which ALiBi's slopes depend on the length of a row, in which documents could not be told apart."""
    return [
        f"{name}_train_length"
        for name, options in run.layers.items()
        if options.get("train_length") and (name == "alibi" or options.get("positions", run.model.pos_emb) == "alibi")
    ]


def _layer_types(run: RunConfig) -> list[str] | None:
    """The mixers of the model, each once; None where `attention_config` is wrong, which was reported when it was derived."""
    try:
        return list(dict.fromkeys(run.model.layer_types))
    except PatternError:
        return None


def _unread_attention_keys(run: RunConfig) -> list[str]:
    """Keys that would change softmax attention, if no layer reads them."""
    types = _layer_types(run)
    if types is None:
        return []
    infos = [registry.layer_info(name) for name in types if name in registry.layer_names()]
    unread = [key for key in _ATTENTION_KEYS if run.get(key) and not any(key in i.neox_keys.values() for i in infos)]
    positions = run.model.pos_emb in ("rotary", "alibi") and not any("positions" in i.options for i in infos)
    return unread + ["pos_emb"] * positions


def _uses_model_heads(run: RunConfig) -> bool:
    """Has a layer the model's number of heads, and not its own, which `Config.tp_divisor` checks when the model is built?"""
    types = _layer_types(run)
    if types is None:
        return True
    types = [name for name in types if uses_heads(name)]
    known = [registry.layer_info(name).names[0] for name in types if name in registry.layer_names()]
    return len(known) < len(types) or any(not run.layers.get(name, {}).get("heads") for name in known)
