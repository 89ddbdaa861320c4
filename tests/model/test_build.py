"""Model shapes, parameter tables, counts of the published models, initial values, stages."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.errors import ConfigError
from megatron.layers.base import Context
from megatron.model.build import build_model, check_tensor_parallel, param_specs
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters, forward_flops
from megatron.model.init import METHODS, init_weights, initial_value
from megatron.model.loss import token_loss
from megatron.model.stages import stages_of
from megatron.parallel.shard_spec import slice_of


def config(**changes: object) -> ModelConfig:
    base = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_width": 48,
        "layer_types": ("metala",) * 2,
    }
    return ModelConfig(**{**base, **changes})  # type: ignore[arg-type]


def metala(d: int, layers: int, f: int, v: int, tied: bool, h: int = 8) -> ModelConfig:
    return ModelConfig(v, d, layers, h, f, ("metala",) * layers, tie_embeddings=tied)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (metala(1024, 24, 2816, 50432, True), 360_058_880),
        (metala(2048, 24, 5632, 50432, True), 1_336_680_448),
        (metala(2048, 24, 5632, 50432, False), 1_439_965_184),
        (metala(2048, 16, 5632, 100280, True, 16), 1_027_637_248),
        (metala(2560, 35, 6912, 100280, True, 20), 3_032_659_200),
    ],
)
def test_parameter_totals_of_the_published_shapes(shape: ModelConfig, expected: int) -> None:
    assert count_parameters(shape)[0] == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simplermsnorm", "non_parametric_layernorm"])
@pytest.mark.parametrize("mlp", ["gated", "plain"])
def test_specs_cover_the_model_and_round_trip(tied: bool, norm: str, mlp: str) -> None:
    c = config(tie_embeddings=tied, norm=norm, mlp=mlp, mlp_bias=True)
    specs = param_specs(c)
    assert ModelConfig.from_dict(c.to_dict()) == c
    assert [s.stage for s in specs.values()] == sorted(s.stage for s in specs.values())
    assert ("lm_head.weight" in specs) != tied
    assert all(not s.decay for n, s in specs.items() if n.endswith("bias") or "norm" in n or "aug_balance" in n)
    with pytest.raises(ValueError, match="unknown fields"):
        ModelConfig.from_dict({**c.to_dict(), "depth": 3})


def test_flops_of_linear_layers_do_not_grow_with_length() -> None:
    c = metala(1024, 24, 2816, 50432, True)
    assert forward_flops(c, 512) == forward_flops(c, 8192)
    total, inner = count_parameters(c)
    assert total - inner == 1024 * 50432
    products = 2 * (
        inner - 24 * 2.5 * 1024 + 1024 * 50432
    )  # biases and gains (1 + 0.5 d, and conv's d counted apart) are no products
    assert abs(forward_flops(c, 2048) / products - 1) < 0.03  # what is left is the scan itself


@pytest.mark.parametrize("method", METHODS)
def test_initialisers_run_and_have_their_spread(method: str) -> None:
    c = config(init_method=method, hidden_size=64, num_heads=2, mlp_width=128)
    specs = param_specs(c)
    value = initial_value(specs["model.layers.0.token_mixer.v_proj.weight"], c, 1)
    sigma = {
        "normal": 0.02,
        "scaled_normal": 0.02 / 2,
        "single_residual_scaled_normal": 0.02 / math.sqrt(2),
        "small_init": math.sqrt(2 / 320),
        "wang_init": 2 / 2 / 8,
        "xavier_uniform": math.sqrt(2 / 128),
        "xavier_normal": math.sqrt(2 / 128),
        "orthogonal": 1 / 8,
        "scaled_orthogonal": 1 / 8,
    }[method]
    assert abs(value.std().item() / sigma - 1) < 0.05


def test_initial_values_do_not_depend_on_the_cut() -> None:
    c = config()
    specs = param_specs(c)
    whole = {n: initial_value(s, c, 7) for n, s in specs.items()}
    for name, spec in specs.items():
        parts = []
        for rank in range(2):
            with torch.device("meta"):
                model = build_model(c)
            init_weights(
                model,
                {n: n for n in specs},
                specs,
                c,
                7,
                slices=lambda s, r=rank: slice_of(s.shape, s.cut, r, 2),
                device="cpu",
                dtype=torch.float32,
            )
            parts.append(dict(model.named_parameters())[name].data)
        dim = slice_of(spec.shape, spec.cut, 0, 2).dim
        joined = parts[0] if dim is None else torch.cat(parts, dim)
        assert torch.equal(joined, whole[name])
    other = {n: initial_value(s, c, 8) for n, s in specs.items()}
    assert not torch.equal(other["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_stages_are_the_model(tied: bool) -> None:
    c = config(tie_embeddings=tied)
    specs = param_specs(c)
    with torch.device("meta"):
        model = build_model(c)
    init_weights(
        model,
        {n: n for n in specs},
        specs,
        c,
        1,
        slices=lambda s: slice_of(s.shape, s.cut, 0, 1),
        device="cpu",
        dtype=torch.float32,
    )
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    stages = stages_of(model)
    assert [s.index for s in stages] == [0, 2, 3, 5, 6]
    activations: object = (tokens,)
    for stage in stages:
        activations = stage.module(activations)
    assert torch.equal(activations, model(tokens)[0])  # type: ignore[arg-type]
    named = {logical for s in stages for logical in s.module.logical.values()}
    assert named == set(specs) | {"lm_head.weight"}
    ids = torch.tensor([[0] * 4 + [1] * 5] * 2)
    activations = (tokens, ids)
    for stage in stages:
        activations = stage.module(activations)
    assert torch.allclose(activations, model(tokens, Context(segment_ids=ids))[0])  # type: ignore[arg-type]


def test_steps_equal_pass_for_the_whole_model() -> None:
    c = config(embedding_scale=True, norm="layernorm", mlp_bias=True)
    specs = param_specs(c)
    with torch.device("meta"):
        model = build_model(c)
    init_weights(
        model,
        {n: n for n in specs},
        specs,
        c,
        1,
        slices=lambda s: slice_of(s.shape, s.cut, 0, 1),
        device="cpu",
        dtype=torch.float64,
    )
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    whole, _ = model(tokens)
    logits, state = model(tokens[:, :5], state=model.init_state(2))
    rows = [logits]
    for t in range(5, 9):
        row, state = model.step(tokens[:, t], state)
        rows.append(row.unsqueeze(1))
    assert (torch.cat(rows, 1) - whole).abs().max() < 1e-12


def test_loss_counts_only_what_the_mask_says() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=g)
    labels = torch.randint(0, 11, (2, 5), generator=g)
    mask = torch.tensor([[1.0, 1, 0, 0, 1], [0, 1, 1, 1, 1]])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(token_loss(logits, labels, mask), (each * mask).sum() / mask.sum())
    assert torch.allclose(token_loss(logits, torch.where(mask > 0, labels, -100)), (each * mask).sum() / mask.sum())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="layer types"):
        build_model(config(num_layers=3))
    with pytest.raises(ConfigError, match="did you mean 'metala'"):
        build_model(config(layer_types=("metal",) * 2))
    with pytest.raises(ConfigError, match="cannot be built"):
        build_model(config(layer_options={"metala": {"depth": 1}}))


@pytest.mark.parametrize(
    ("mixer", "heads", "options", "parts"),
    [
        ("metala", 4, {}, "4 heads"),
        ("based", 3, {"heads": 4}, "4 heads"),
        ("jrt", 3, {"heads": 2}, "2 heads"),
        ("global", 8, {"kv_heads": 2}, "2 heads"),
        ("alibi", 8, {}, "8 heads"),
        ("mamba", 3, {"expand": 3}, "192 channels"),
        ("base_conv", 3, {}, "128 channels"),
    ],
)
def test_a_mixer_declares_into_how_many_parts_it_falls(mixer: str, heads: int, options: dict[str, int], parts: str) -> None:
    """Whatever the model's number of heads is: heads of its own, groups of queries, channels."""
    shape = config(hidden_size=64, num_heads=heads, layer_types=(mixer,) * 2, layer_options={mixer: options})
    number = int(parts.split()[0])
    check_tensor_parallel(shape, number)
    with pytest.raises(ConfigError, match=f"{parts} cannot be split over model_parallel_size {2 * number}") as caught:
        check_tensor_parallel(shape, 2 * number)
    assert caught.value.where == f"layers '{mixer}'"
