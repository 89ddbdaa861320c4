"""Cross rules about the model's shape: sizes that must divide, keys that contradict each other. A table, as `rules.py` is."""

from __future__ import annotations

from megatron import registry
from megatron.config.derive import uses_heads
from megatron.config.pattern import PatternError
from megatron.config.rule import Rule
from megatron.config.schema import RunConfig

_POINTWISE = {
    "gelu",
    "relu",
    "softsign",
    "swish",
    "mish",
    "silu",
    "elu",
    "sigmoid",
    "leak",
    "1+elu",
    "2+elu",
    "sine",
    "identity",
}

_ATTENTION_KEYS = ("num_kv_heads", "sliding_window_width", "use_qk_layernorm", "attention_dropout")


def _unread(run: RunConfig) -> list[str]:
    """Keys that would change softmax attention, where no layer is one that reads them."""
    try:
        types = [name for name in dict.fromkeys(run.model.layer_types) if name in registry.layer_names()]
    except PatternError:
        return []  # reported when it was derived
    infos = [registry.layer_info(name) for name in types]
    found = [key for key in _ATTENTION_KEYS if run.get(key) and not any(key in i.neox_keys.values() for i in infos)]
    positions = run.model.pos_emb in ("rotary", "alibi") and not any("positions" in i.options for i in infos)
    return found + ["pos_emb"] * positions


def _heads(run: RunConfig) -> bool:
    """Has a layer heads, so that their number must divide?"""
    try:
        return any(uses_heads(name) for name in dict.fromkeys(run.model.layer_types))
    except PatternError:
        return True


def _reads_the_heads(run: RunConfig) -> bool:
    """Has a layer the model's heads and none of its own, which `Config.tp_divisor` counts when the model is built?"""
    try:
        types = [name for name in dict.fromkeys(run.model.layer_types) if uses_heads(name)]
    except PatternError:
        return True
    own = [registry.layer_info(name).names[0] for name in types if name in registry.layer_names()]
    return len(own) < len(types) or any(not run.layers.get(name, {}).get("heads") for name in own)


MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        ("num_layers",),
        lambda r: not r.model.num_layers,
        lambda r: "num_layers is not given",
        "write num_layers: the number of blocks",
        needs=True,
    ),
    Rule(
        ("hidden_size",),
        lambda r: not r.model.hidden_size,
        lambda r: "hidden_size is not given",
        "write hidden_size: the width of the model",
        needs=True,
    ),
    Rule(
        ("num_attention_heads",),
        lambda r: not r.model.num_attention_heads,
        lambda r: "num_attention_heads is not given",
        "MetaLA's released models have heads of width 128: hidden_size / 128",
        needs=True,
    ),
    Rule(
        ("hidden_size", "num_attention_heads"),
        lambda r: r.model.hidden_size % (r.model.num_attention_heads or 1) != 0 and _reads_the_heads(r),
        lambda r: f"hidden_size {r.model.hidden_size} is not a multiple of num_attention_heads {r.model.num_attention_heads}",
        "every head needs the same whole width",
    ),
    Rule(
        ("num_attention_heads", "model_parallel_size"),
        lambda r: r.model.num_attention_heads % r.parallel.tensor_ranks != 0 and _reads_the_heads(r),
        lambda r: (
            f"num_attention_heads {r.model.num_attention_heads} is not a multiple of model_parallel_size"
            f" {r.parallel.tensor_ranks}"
        ),
        "mixers are cut by head; choose a divisor of the head count",
    ),
    Rule(
        ("intermediate_size", "mlp_branch_size", "hidden_size", "model_parallel_size"),
        lambda r: r.model.mlp_width % r.parallel.tensor_ranks != 0,
        lambda r: f"the MLP width {r.model.mlp_width} is not a multiple of model_parallel_size {r.parallel.tensor_ranks}",
        "set mlp_branch_size, or mlp_multiple_of to model_parallel_size",
    ),
    Rule(
        ("num_layers", "pipe_parallel_size"),
        lambda r: 0 < r.model.num_layers < r.parallel.pipe_stages,
        lambda r: f"num_layers {r.model.num_layers} is less than pipe_parallel_size {r.parallel.pipe_stages}",
        "every pipeline stage needs at least one block",
    ),
    Rule(
        ("max_position_embeddings", "seq_length"),
        lambda r: r.model.max_position_embeddings < r.model.seq_length,
        lambda r: f"max_position_embeddings {r.model.max_position_embeddings} is less than seq_length {r.model.seq_length}",
        "leave max_position_embeddings unset: it follows seq_length",
    ),
    Rule(
        ("intermediate_size", "expansion_factor"),
        lambda r: bool(r.model.intermediate_size and r.model.expansion_factor),
        lambda r: "intermediate_size and expansion_factor are both given",
        "keep one of them",
    ),
    Rule(
        ("mlp_branch_size", "intermediate_size", "expansion_factor"),
        lambda r: bool(r.model.mlp_branch_size and (r.model.intermediate_size or r.model.expansion_factor)),
        lambda r: "mlp_branch_size says the MLP width, and so does intermediate_size or expansion_factor",
        "keep mlp_branch_size alone",
    ),
    Rule(
        ("mlp_type", "activation"),
        lambda r: r.model.mlp_type == "llama" and r.model.activation not in _POINTWISE,
        lambda r: f"mlp_type: llama takes a pointwise activation, not {r.model.activation}",
        "write activation: silu (mlp_type llama is gated already)",
    ),
    Rule(
        ("pos_emb", *_ATTENTION_KEYS),
        lambda r: bool(_unread(r)),
        lambda r: f"{', '.join(f'{key}: {r.get(key)}' for key in _unread(r))}: no layer of attention_config reads this",
        "it belongs to softmax attention (global, flash); recurrent mixers need no positions: pos_emb: none",
    ),
    Rule(
        ("num_kv_heads", "num_attention_heads"),
        lambda r: bool(r.model.num_kv_heads) and r.model.num_attention_heads % (r.model.num_kv_heads or 1) != 0,
        lambda r: f"num_attention_heads {r.model.num_attention_heads} is not a multiple of num_kv_heads {r.model.num_kv_heads}",
        "each key/value head serves the same number of query heads",
    ),
    Rule(
        ("num_kv_heads", "model_parallel_size"),
        lambda r: (r.model.num_kv_heads or 0) % r.parallel.tensor_ranks != 0,
        lambda r: f"num_kv_heads {r.model.num_kv_heads} is not a multiple of model_parallel_size {r.parallel.tensor_ranks}",
        "attention is cut by key/value head; choose a divisor of num_kv_heads",
    ),
    Rule(
        ("gpt_j_tied", "gpt_j_residual"),
        lambda r: r.model.gpt_j_tied and not r.model.gpt_j_residual,
        lambda r: "gpt_j_tied has no meaning without gpt_j_residual",
        "write gpt_j_residual: true, or remove gpt_j_tied",
    ),
    Rule(
        ("bias_gelu_fusion", "activation"),
        lambda r: r.model.bias_gelu_fusion and r.model.activation != "gelu",
        lambda r: f"bias_gelu_fusion goes with activation: gelu, not {r.model.activation}",
        "remove bias_gelu_fusion",
    ),
    Rule(
        ("reset_attention_at_eod", "reset_state_at_eod"),
        lambda r: r.training.reset_attention_at_eod and not r.training.reset_state_at_eod,
        lambda r: "reset_attention_at_eod is true and reset_state_at_eod is false",
        "all mixers keep documents apart alike: set one of them and leave the other unset",
    ),
    Rule(
        ("padded_vocab_size", "model_parallel_size"),
        lambda r: (r.tokenizer.padded_vocab_size or 0) % r.parallel.tensor_ranks != 0,
        lambda r: (
            f"padded_vocab_size {r.tokenizer.padded_vocab_size} is not a multiple of model_parallel_size"
            f" {r.parallel.tensor_ranks}"
        ),
        "leave it unset: it follows the tokenizer",
    ),
)
