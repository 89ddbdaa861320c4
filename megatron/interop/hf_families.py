"""The families of transformers that softmax models go to and come from: GPT-NeoX (Pythia), Llama, Mistral, Bloom, MPT."""

from __future__ import annotations

from typing import Any

from transformers import BloomConfig, GPTNeoXConfig, LlamaConfig, MistralConfig, MptConfig

from megatron.interop.hf_models import Layout, Native, obstacle_in, options_of
from megatron.model.config import ModelConfig

_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_GELU |= {"silu": "silu", "swish": "silu"}
_NEOX_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}


def _options(config: ModelConfig) -> dict[str, Any]:
    options = options_of(config)
    assert isinstance(options, dict)  # the obstacle was asked for first
    return options


def _refuse(what: str, wrong: bool) -> None:
    if wrong:
        raise ValueError(f"{what} is not built")


def _rotary(settings: Any) -> dict[str, Any]:
    rope = settings.rope_parameters or {}
    _refuse(f"rotary scaling '{rope.get('rope_type')}'", rope.get("rope_type", "default") != "default")
    return {"positions": "rotary", "rotary_base": float(rope["rope_theta"])}


def _rope(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": options["rotary_base"], **more}


NEOX_LAYOUT = Layout(
    outer={
        "model.embed_tokens.weight": "gpt_neox.embed_in.weight",
        "model.final_norm.weight": "gpt_neox.final_layer_norm.weight",
        "model.final_norm.bias": "gpt_neox.final_layer_norm.bias",
        "lm_head.weight": "embed_out.weight",
    },
    block="gpt_neox.layers.{}.",
    inner={
        "token_norm": "input_layernorm",
        "channel_norm": "post_attention_layernorm",
        "token_mixer.out_proj": "attention.dense",
        "channel_mixer.l1": "mlp.dense_h_to_4h",
        "channel_mixer.l3": "mlp.dense_4h_to_h",
    },
    fused="attention.query_key_value",
    by_head=True,
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)


def _neox_obstacle(config: ModelConfig) -> str | None:
    model = {"norm": "layernorm", "mlp": "plain", "mlp_bias": True, "activation": frozenset(_NEOX_ACT)}
    model |= {"parallel_residual": config.parallel_residual}
    return obstacle_in(config, model, {"positions": "rotary"})


def _neox_fields(config: ModelConfig) -> dict[str, Any]:
    options = _options(config)
    return {
        **_sizes(config),
        "intermediate_size": config.mlp_width,
        "hidden_act": _NEOX_ACT[config.activation],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "rope_parameters": _rope(options, partial_rotary_factor=options["rotary_fraction"]),
        "attention_bias": options["bias"],
    }


def _neox_shape(c: Any) -> ModelConfig:
    rotary = {**_rotary(c), "rotary_fraction": float(c.rope_parameters.get("partial_rotary_factor", 1.0))}
    return ModelConfig(
        **_basis(c),
        mlp_width=c.intermediate_size,
        layer_options={"global": {**rotary, "bias": c.attention_bias}},
        norm="layernorm",
        norm_eps=c.layer_norm_eps,
        mlp="plain",
        activation=_activation(c.hidden_act),
        mlp_bias=True,
        parallel_residual=c.use_parallel_residual,
    )


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _basis(c: Any) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "layer_types": ("global",) * c.num_hidden_layers,
        "tie_embeddings": c.tie_word_embeddings,
        "init_std": c.initializer_range,
    }


def _activation(name: str) -> str:
    _refuse(f"the activation '{name}'", name not in _GELU)
    return _GELU[name]


LLAMA_LAYOUT = Layout(
    outer={name: name for name in ("model.embed_tokens.weight", "lm_head.weight")}
    | {"model.final_norm.weight": "model.norm.weight"},
    block="model.layers.{}.",
    inner={
        "token_norm": "input_layernorm",
        "channel_norm": "post_attention_layernorm",
        "token_mixer.q_proj": "self_attn.q_proj",
        "token_mixer.k_proj": "self_attn.k_proj",
        "token_mixer.v_proj": "self_attn.v_proj",
        "token_mixer.out_proj": "self_attn.o_proj",
        "channel_mixer.l1": "mlp.gate_proj",
        "channel_mixer.l2": "mlp.up_proj",
        "channel_mixer.l3": "mlp.down_proj",
    },
    ignored=("rotary_emb.inv_freq",),
)
_LLAMA_MODEL: dict[str, Any] = {"norm": "rmsnorm", "mlp": "gated", "activation": "silu"}


def _llama_obstacle(config: ModelConfig) -> str | None:
    attention: dict[str, Any] = {"positions": "rotary", "rotary_fraction": 1.0}
    return obstacle_in(config, _LLAMA_MODEL, attention | _any_groups(config))


def _mistral_obstacle(config: ModelConfig) -> str | None:
    options = options_of(config)
    if isinstance(options, dict) and options["window"] is None:
        return "it has no window"
    window = None if isinstance(options, str) else options["window"]
    attention = {"positions": "rotary", "rotary_fraction": 1.0, "window": window, "bias": False}
    return obstacle_in(config, {**_LLAMA_MODEL, "mlp_bias": False}, attention | _any_groups(config))


def _any_groups(config: ModelConfig) -> dict[str, Any]:
    options = options_of(config)
    return {} if isinstance(options, str) else {"kv_heads": options["kv_heads"]}


def _mistral_fields(config: ModelConfig) -> dict[str, Any]:
    options = _options(config)
    return {
        **_sizes(config),
        "intermediate_size": config.mlp_width,
        "num_key_value_heads": options["kv_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope(options),
        # their window counts the token itself, ours the tokens before it
        "sliding_window": None if options["window"] is None else options["window"] + 1,
    }


def _llama_fields(config: ModelConfig) -> dict[str, Any]:
    made = _mistral_fields(config)
    del made["sliding_window"]
    return {**made, "attention_bias": _options(config)["bias"], "mlp_bias": config.mlp_bias}


def _llama_shape(c: Any) -> ModelConfig:
    window = getattr(c, "sliding_window", None)
    _refuse(
        f"a head width of {c.head_dim} at {c.num_attention_heads} heads", c.head_dim * c.num_attention_heads != c.hidden_size
    )
    _refuse(f"the activation '{c.hidden_act}'", c.hidden_act != "silu")
    options = {**_rotary(c), "kv_heads": c.num_key_value_heads, "bias": getattr(c, "attention_bias", False)}
    return ModelConfig(
        **_basis(c),
        mlp_width=c.intermediate_size,
        layer_options={"global": options | ({"window": window - 1} if window else {})},
        norm="rmsnorm",
        norm_eps=c.rms_norm_eps,
        mlp_bias=getattr(c, "mlp_bias", False),
    )


BLOOM_LAYOUT = Layout(
    outer={
        "model.embed_tokens.weight": "transformer.word_embeddings.weight",
        "model.embed_tokens.norm.weight": "transformer.word_embeddings_layernorm.weight",
        "model.embed_tokens.norm.bias": "transformer.word_embeddings_layernorm.bias",
        "model.final_norm.weight": "transformer.ln_f.weight",
        "model.final_norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    },
    block="transformer.h.{}.",
    inner={
        "token_norm": "input_layernorm",
        "channel_norm": "post_attention_layernorm",
        "token_mixer.out_proj": "self_attention.dense",
        "channel_mixer.l1": "mlp.dense_h_to_4h",
        "channel_mixer.l3": "mlp.dense_4h_to_h",
    },
    fused="self_attention.query_key_value",
    by_head=True,
)


def _bloom_obstacle(config: ModelConfig) -> str | None:
    model = {"norm": "layernorm", "mlp": "plain", "mlp_bias": True, "activation": "gelu_tanh", "embedding_norm": True}
    model |= {"mlp_width": 4 * config.hidden_size}
    return obstacle_in(config, model, {"positions": "alibi", "bias": True, "bias_max": 8.0})


def _bloom_fields(config: ModelConfig) -> dict[str, Any]:
    return {**_sizes(config), "layer_norm_epsilon": config.norm_eps}


def _bloom_shape(c: BloomConfig) -> ModelConfig:
    _refuse("a residual taken after the norm", c.apply_residual_connection_post_layernorm)
    return ModelConfig(
        **_basis(c) | {"layer_types": ("alibi",) * c.num_hidden_layers},
        mlp_width=4 * c.hidden_size,
        layer_options={"alibi": {"bias": True}},
        norm="layernorm",
        norm_eps=c.layer_norm_epsilon,
        mlp="plain",
        activation="gelu_tanh",
        mlp_bias=True,
        embedding_norm=True,
    )


MPT_LAYOUT = Layout(
    outer={
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.final_norm.weight": "transformer.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    },
    block="transformer.blocks.{}.",
    inner={
        "token_norm": "norm_1",
        "channel_norm": "norm_2",
        "token_mixer.out_proj": "attn.out_proj",
        "channel_mixer.l1": "ffn.up_proj",
        "channel_mixer.l3": "ffn.down_proj",
    },
    fused="attn.Wqkv",
)


def _mpt_obstacle(config: ModelConfig) -> str | None:
    model = {"norm": "layernorm_no_bias", "mlp": "plain", "mlp_bias": False, "activation": "gelu", "tie_embeddings": True}
    model |= {"mlp_width": 4 * config.hidden_size}
    # transformers' class reads alibi_bias_max and then uses 8 all the same
    return obstacle_in(config, model, {"positions": "alibi", "bias": False, "bias_max": 8.0})


def _mpt_fields(config: ModelConfig) -> dict[str, Any]:
    attention = {"alibi": True, "alibi_bias_max": 8}
    return {**_sizes(config), "layer_norm_epsilon": config.norm_eps, "attn_config": attention, "learned_pos_emb": False}


def _mpt_shape(c: Any) -> ModelConfig:
    a = c.attn_config
    asked = {"clip_qkv": a.clip_qkv, "softmax_scale": a.softmax_scale, "qk_ln": a.qk_ln, "prefix_lm": a.prefix_lm}
    for name, value in asked.items():
        _refuse(f"attn_config.{name} = {value}", bool(value))
    _refuse("logit_scale", c.logit_scale is not None)
    _refuse("MPT without ALiBi", not a.alibi)
    return ModelConfig(
        **_basis(c) | {"layer_types": ("alibi",) * c.num_hidden_layers, "tie_embeddings": True},
        mlp_width=4 * c.hidden_size,
        layer_options={"alibi": {"bias_max": float(a.alibi_bias_max)}} if a.alibi_bias_max != 8 else {},
        norm="layernorm_no_bias",
        norm_eps=c.layer_norm_epsilon,
        mlp="plain",
        activation="gelu",
    )


NATIVES: tuple[Native, ...] = (
    Native("gpt_neox", "GPTNeoXForCausalLM", GPTNeoXConfig, NEOX_LAYOUT, _neox_obstacle, _neox_fields, _neox_shape),
    Native("llama", "LlamaForCausalLM", LlamaConfig, LLAMA_LAYOUT, _llama_obstacle, _llama_fields, _llama_shape),
    Native("mistral", "MistralForCausalLM", MistralConfig, LLAMA_LAYOUT, _mistral_obstacle, _mistral_fields, _llama_shape),
    Native("bloom", "BloomForCausalLM", BloomConfig, BLOOM_LAYOUT, _bloom_obstacle, _bloom_fields, _bloom_shape, "seq_length"),
    Native("mpt", "MptForCausalLM", MptConfig, MPT_LAYOUT, _mpt_obstacle, _mpt_fields, _mpt_shape, "max_seq_len"),
)


def native_by_type(model_type: Any) -> Native | None:
    """The family of a config.json's `model_type`."""
    return next((family for family in NATIVES if family.model_type == model_type), None)


def native_for(config: ModelConfig) -> Native | None:
    """The family whose config can say everything about a model."""
    return next((family for family in NATIVES if family.obstacle(config) is None), None)
