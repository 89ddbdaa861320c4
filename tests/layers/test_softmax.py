"""Softmax attention's own facts: sizes, options, NeoX's keys, slopes per rank, padding and caches for every kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron.layers.base import Context
from megatron.layers.softmax import AlibiAttention, SoftmaxAttention
from megatron.ops.attention import alibi_slopes
from megatron.registry import layer_info

D, H, S = 32, 4, 50
KINDS = [
    {"positions": "rotary", "rotary_fraction": 0.5, "bias": True},
    {"positions": "alibi", "kv_heads": 2},
    {"positions": "none", "kv_heads": 1, "qk_norm": True},
    {"positions": "rotary", "window": 7},
    {"positions": "alibi", "window": 20, "kv_heads": 2, "bias": True},
]


def make(**options: object) -> SoftmaxAttention:
    layer = SoftmaxAttention(SoftmaxAttention.Config(hidden_size=D, num_heads=H, **options)).double()  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return layer


def inputs(b: int = 2, s: int = S) -> Tensor:
    return torch.randn(b, s, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(params=KINDS, ids=lambda k: "-".join(f"{v}" for v in k.values()))
def layer(request: pytest.FixtureRequest) -> SoftmaxAttention:
    return make(**request.param)


@pytest.mark.parametrize("cuts", [[1, 2, 20, 50], [30, 35, 50], [49, 50], [25, 50]])
def test_several_tokens_at_once_with_a_cache(layer: SoftmaxAttention, cuts: list[int]) -> None:
    x = inputs()
    whole, _ = layer(x, Context())
    state, parts = layer.init_state(2, x.dtype, "cpu"), []
    for start, end in itertools.pairwise([0, *cuts]):
        y, after = layer(x[:, start:end], Context(), state)
        assert after is not None
        parts.append(y)
        state = after
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12


def test_left_padded_rows_then_steps_equal_rows_alone(layer: SoftmaxAttention) -> None:
    """Rows of 50 and 31 tokens: prefill, five tokens at once, steps; every row as if it were alone."""
    x = inputs()
    mask = torch.ones(2, S)
    mask[1, :19] = 0
    y, state = layer(x, Context(mask=mask), layer.init_state(2, x.dtype, "cpu"))
    short, alone = layer(x[1:, 19:], Context(), layer.init_state(1, x.dtype, "cpu"))
    assert (y[1:, 19:] - short).abs().max() < 1e-12
    more = inputs(2, 8)
    assert state is not None and alone is not None
    y5, state = layer(more[:, :5], Context(), state)
    a5, alone = layer(more[1:, :5], Context(), alone)
    assert (y5[1:] - a5).abs().max() < 1e-12
    assert state is not None and alone is not None
    assert (layer.step(more[:, 5], state, Context())[0][1:] - layer.step(more[1:, 5], alone, Context())[0]).abs().max() < 1e-12


def test_padding_between_cached_and_new_tokens(layer: SoftmaxAttention) -> None:
    x = inputs(1)
    _, state = layer(x[:, :20], Context(), layer.init_state(1, x.dtype, "cpu"))
    want, _ = layer(x[:, 20:], Context(), state)
    padded = torch.cat([torch.full((1, 6, D), 2.0, dtype=x.dtype), x[:, 20:]], 1)
    mask = torch.ones(1, 36)
    mask[:, :6] = 0
    y, _ = layer(padded, Context(mask=mask), state)
    assert (y[:, 6:] - want).abs().max() < 1e-12


def test_a_document_that_goes_on_in_the_next_call(layer: SoftmaxAttention) -> None:
    """Borders inside both calls; the second one starts in the first one's last document."""
    x = inputs(1)
    ids = torch.tensor([[0] * 12 + [1] * 28 + [2] * 10])
    whole, _ = layer(x, Context(segment_ids=ids))
    a, state = layer(x[:, :30], Context(segment_ids=ids[:, :30]), layer.init_state(1, x.dtype, "cpu"))
    b, _ = layer(x[:, 30:], Context(segment_ids=ids[:, 30:]), state)
    assert (torch.cat([a, b], 1) - whole).abs().max() < 1e-12
    assert (whole[:, 12:40] - layer(x[:, 12:40], Context())[0]).abs().max() < 1e-12


def test_a_window_has_constant_memory() -> None:
    layer = make(positions="rotary", window=7, kv_heads=2)
    state = layer.init_state(1, torch.float64, "cpu")
    first = {name: t.shape for name, t in state.items()}
    for t in range(12):
        _, state = layer.step(inputs(1)[:, t], state, Context())
        assert {name: v.shape for name, v in state.items()} == first
        assert state["keys"].untyped_storage().nbytes() <= 8 * 2 * 8 * 8  # never more than the window and one token
    assert layer.state_size()["keys"] == 7 * 2 * (D // H)
    assert state["places"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]


def test_slopes_come_from_the_whole_models_heads() -> None:
    """12 heads on 4 ranks: the parts in order are the golden list, and not the list of 3 heads."""
    parts = []
    for rank in range(4):
        part = AlibiAttention(AlibiAttention.Config(hidden_size=48, num_heads=12))
        part.q_proj = torch.nn.Linear(48, 12)
        part.set_shard(rank, 4)
        slopes = part.slopes("cpu")
        assert slopes is not None and slopes.dtype == torch.float32
        parts += slopes.tolist()
    assert parts == pytest.approx(alibi_slopes(12)) and parts[:3] != pytest.approx(alibi_slopes(3))


def test_slopes_are_no_parameters() -> None:
    layer = AlibiAttention(AlibiAttention.Config(hidden_size=D, num_heads=H)).bfloat16()
    assert not list(layer.buffers()) and all("slope" not in name for name, _ in layer.named_parameters())
    assert layer.slopes("cpu").tolist() == alibi_slopes(H)  # type: ignore[union-attr] - not rounded with the model


def test_position_interpolation() -> None:
    """Dynamic: unchanged up to the trained length, slopes times L / length beyond, also in a cache; fixed: divided always."""
    x = inputs()
    plain, dynamic, fixed = (
        make(positions="alibi"),
        make(positions="alibi", train_length=25),
        make(positions="alibi", slope_factor=2),
    )
    assert torch.equal(plain(x[:, :25], Context())[0], dynamic(x[:, :25], Context())[0])
    assert (dynamic(x, Context())[0] - fixed(x, Context())[0]).abs().max() < 1e-12  # 50 = 2 x 25
    assert (plain(x, Context())[0] - fixed(x, Context())[0]).abs().max() > 1e-3
    _, state = dynamic(x[:, :49], Context(), dynamic.init_state(2, x.dtype, "cpu"))
    _, other = fixed(x[:, :49], Context(), fixed.init_state(2, x.dtype, "cpu"))
    assert (dynamic.step(x[:, 49], state, Context())[0] - fixed.step(x[:, 49], other, Context())[0]).abs().max() < 1e-12


def test_sizes_and_flops() -> None:
    with torch.device("meta"):
        layer = SoftmaxAttention(SoftmaxAttention.Config(hidden_size=1024, num_heads=16, kv_heads=4, bias=True, qk_norm=True))
    assert layer.param_count() == 2 * 1024 * 1024 + 2 * 1024 * 256 + 1024 * 2 + 256 * 2 + 1024 + 256
    full = make().flops(1000)
    assert full == 8 * D * D + 4 * D * 500.5
    assert make(window=9).flops(10_000_000) == pytest.approx(8 * D * D + 4 * D * 10, rel=1e-6)
    assert set(make(qk_norm=True).no_decay()) == {"q_norm", "k_norm"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kv_heads 3"):
        make(kv_heads=3)
    with pytest.raises(ValueError, match="sinusoidal"):
        make(positions="sinusoidal")


@pytest.mark.parametrize("name", ["global", "flash", "alibi", "sliding"])
def test_neox_keys_name_options_and_known_keys(name: str) -> None:
    from megatron.config.catalog import catalog

    info = layer_info(name)
    assert info.neox_keys and set(info.neox_keys) <= set(info.options) and set(info.neox_keys.values()) <= set(catalog())


def test_dropout_only_in_training() -> None:
    layer, x = make(dropout=0.5), inputs()
    assert not torch.equal(layer(x, Context())[0], layer(x, Context())[0])
    layer.eval()
    assert torch.equal(layer(x, Context())[0], layer(x, Context())[0])
