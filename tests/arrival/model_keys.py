"""Keys of the model and of its mixers: looked for in the built modules and in their first values."""

from __future__ import annotations

from typing import Any

from megatron.model.mlp import ACTIVATIONS
from megatron.registry import layer_options
from tests.arrival.arrivals import Arrival
from tests.arrival.case import Case

SOFTMAX = {"attention_config": [[["global"], "all"]]}
MAMBA = {"attention_config": [[["mamba"], "all"]], "num_attention_heads": None}
LLAMA = {"mlp_type": "llama", "activation": "silu"}
EMBEDDING = "model.embed_tokens.weight"


def _mixer(field: str) -> Any:
    """The option as the mixer itself holds it."""
    return lambda case: getattr(case.block.token_mixer.config, field)


def _width(case: Case) -> int:
    mlp = case.block.channel_mixer
    assert mlp is not None
    return mlp.l1.out_features


def _activation(case: Case) -> str:
    mlp = case.block.channel_mixer
    assert mlp is not None
    return next(name for name, function in ACTIVATIONS.items() if function is mlp.act)


def _spread(name: str) -> Any:
    """Standard deviation of a parameter's first values."""
    return lambda case: float(case.weight(name).std())


def _positions(case: Case) -> int:
    table = case.engine.local.stages[0].body.positions  # type: ignore[union-attr]
    return 0 if table is None else table.shape[0]  # type: ignore[index, union-attr, return-value]


def _windowed(case: Case) -> int | None:
    return case.block.token_mixer._mixing(case.weight(EMBEDDING)).rule.window  # type: ignore[operator]


def _mlp_parts(case: Case) -> list[str]:
    mlp = case.block.channel_mixer
    return [] if mlp is None else [name for name, _ in mlp.named_parameters()]


MODEL: dict[str, Arrival] = {
    "num_layers": Arrival(3, lambda c: len(c.engine.local.stages) - 3),
    "hidden_size": Arrival(24, lambda c: c.weight(EMBEDDING).shape[1]),
    "num_attention_heads": Arrival(4, _mixer("num_heads")),
    "num_kv_heads": Arrival(1, lambda c: c.block.token_mixer.k_proj.out_features, 8, SOFTMAX),
    "seq_length": Arrival(32, lambda c: c.batch.tokens.shape[1]),
    "max_position_embeddings": Arrival(40, _positions, beside=SOFTMAX),
    "intermediate_size": Arrival(40, _width, beside=LLAMA),
    "mlp_multiple_of": Arrival(10, _width, 50, LLAMA),  # 8/3 of 16, rounded up
    "mlp_branch_size": Arrival(56, _width),
    "expansion_factor": Arrival(3.0, _width, 48),
    "mlp_type": Arrival("none", _mlp_parts, []),
    "activation": Arrival("relu", _activation),
    "norm": Arrival("rmsnorm", lambda c: c.block.token_norm.kind),
    "layernorm_epsilon": Arrival(1e-3, lambda c: c.block.token_norm.eps),
    "rms_norm_epsilon": Arrival(1e-3, lambda c: c.block.token_norm.eps, beside={"norm": "rmsnorm"}),
    "simplermsnorm_epsilon": Arrival(1e-3, lambda c: c.block.token_norm.eps, beside={"norm": "simplermsnorm"}),
    "bias_gelu_fusion": Arrival(True, _activation, "gelu_tanh"),
    "use_bias_in_mlp": Arrival(False, _mlp_parts, ["l1.weight", "l3.weight"]),
    "use_bias_in_attn_linear": Arrival(False, lambda c: c.block.token_mixer.q_proj.bias is not None, beside=SOFTMAX),
    "use_bias_in_norms": Arrival(False, lambda c: c.block.token_norm.bias is not None),
    "use_qk_layernorm": Arrival(True, lambda c: c.block.token_mixer.q_norm is not None, beside=SOFTMAX),
    "pos_emb": Arrival("rotary", _mixer("positions"), beside=SOFTMAX),
    "rotary_pct": Arrival(0.5, lambda c: c.block.token_mixer.rotary, 4, {**SOFTMAX, "pos_emb": "rotary"}),
    "rotary_emb_base": Arrival(500, _mixer("rotary_base"), 500.0, {**SOFTMAX, "pos_emb": "rotary"}),
    "sliding_window_width": Arrival(5, _windowed, beside=SOFTMAX),
    "no_weight_tying": Arrival(True, lambda c: "lm_head.weight" in c.engine.parameters()),
    "attention_config": Arrival(
        [[["metala"], 1], [["based"], 1]],
        lambda c: [type(stage.body.token_mixer).__name__ for stage in c.engine.local.stages[1:3]],
        ["MetaLA", "Based"],
    ),
    "init_method": Arrival("small_init", _spread(EMBEDDING), (2 / (5 * 16)) ** 0.5, tolerance=0.03),
    "output_layer_init_method": Arrival(
        "small_init", _spread("model.layers.0.token_mixer.out_proj.weight"), (2 / (5 * 16)) ** 0.5, tolerance=0.15
    ),
    "init_method_std": Arrival(0.5, _spread(EMBEDDING), tolerance=0.03),
    "mixer_init": Arrival("methods", _spread("model.layers.0.token_mixer.in_proj.weight"), 0.02, MAMBA, tolerance=0.1),
    "embedding_scale": Arrival(True, lambda c: c.engine.local.stages[0].body.embed_scale, 4.0),
    "embedding_norm": Arrival(True, lambda c: c.engine.local.stages[0].body.norm is not None),
    "residual_fp32": Arrival(True, lambda c: c.block.wide),
    "hidden_dropout": Arrival(0.25, lambda c: c.block.dropout),
    "attention_dropout": Arrival(0.25, lambda c: c.block.token_mixer._mixing(c.weight(EMBEDDING)).rule.dropout, beside=SOFTMAX),
    "make_vocab_size_divisible_by": Arrival(100, lambda c: c.weight(EMBEDDING).shape[0], 600),
    "gpt_j_residual": Arrival(True, lambda c: c.block.parallel),
    "gpt_j_tied": Arrival(True, lambda c: c.block.channel_norm is None, beside={"gpt_j_residual": True}),
}

# Values of mixers' options; each is looked for in the mixer of that name.
_OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {
        "use_bias_in_conv": False, "use_bias_in_linears": True, "state_size": 8, "conv_width": 3, "expand": 3, "dt_rank": 2,
    },
    "base_conv": {"conv_width": 5, "expand": 3, "bias": False},
    "based": {"feature_width": 8, "heads": 4, "decay": True, "decay_const": -2.0},
    "jrt": {"feature_width": 8, "heads": 4, "prefix_length": 8},
    "metala": {"conv_width": 3, "gate_round": "bf16"},
    "sliding": {"window": 5, "rotary_fraction": 0.5, "rotary_base": 500.0, "dropout": 0.25},
    "global": {
        "positions": "rotary", "kv_heads": 1, "window": 5, "rotary_fraction": 0.5, "rotary_base": 500.0, "bias": True,
        "qk_norm": True, "dropout": 0.25, "bias_max": 6.0, "train_length": 12, "slope_factor": 2.0,
    },
    "alibi": {
        "kv_heads": 1, "window": 5, "bias": True, "qk_norm": True, "dropout": 0.25, "bias_max": 6.0,
        "train_length": 12, "slope_factor": 2.0,
    },
}  # fmt: skip
_BESIDE: dict[str, dict[str, Any]] = {
    "global_bias": {"use_bias_in_attn_linear": False},
    "alibi_bias": {"use_bias_in_attn_linear": False},
    "based_decay_const": {"based_decay": True},
    "jrt_feature_width": {"jrt_prefix_length": 8, "objective": "jrt"},
    "jrt_heads": {"jrt_prefix_length": 8, "objective": "jrt"},
    "jrt_prefix_length": {"objective": "jrt", "objective_prefix_length": None},
}


def _another(default: Any) -> Any:
    """A value that is not the default of an option, for mixers that are not listed above."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return 2 * default or 2
    return default / 2 or 0.25


for _name, _known in layer_options().items():
    if _name not in _OPTIONS:
        _numbers = {n: o.default for n, o in _known.items() if isinstance(o.default, (bool, int, float))}
        _OPTIONS[_name] = {n: _another(default) for n, default in _numbers.items()}

MIXERS: dict[str, Arrival] = {
    f"{mixer}_{name}": Arrival(
        value,
        _mixer(name),
        beside={"attention_config": [[[mixer], "all"]], "pos_emb": "none", **_BESIDE.get(f"{mixer}_{name}", {})},
    )
    for mixer, options in _OPTIONS.items()
    for name, value in options.items()
}
