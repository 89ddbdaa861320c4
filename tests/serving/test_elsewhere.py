"""What docs/serving.md says of other programs' operators, computed: MetaLA by an operator whose states are square."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.metala import decay_and_key
from megatron.ops.scan.chunk import scan_chunked


def square_gated_linear_attention(k: Tensor, v: Tensor, q: Tensor, g: Tensor, scale: float) -> Tensor:
    """k, v, q, g [t, h, s] -> y [t, h, s] with states [h, s, s], as `ggml_gated_linear_attn`: S = g S + k v, y = scale q S."""
    state, out = k.new_zeros(*k.shape[1:], k.shape[2]), []
    for t in range(len(k)):
        state = state * g[t, :, :, None] + k[t, :, :, None] * v[t, :, None, :]
        out.append(torch.einsum("hi,hij->hj", q[t] * scale, state))
    return torch.stack(out)


def test_a_metala_head_is_two_square_heads_that_share_query_key_and_decay() -> None:
    """A head's values are twice as wide as its keys: each half of them is a head of the square operator, nothing is padded."""
    t, h, k = 12, 3, 8
    g = torch.Generator().manual_seed(0)
    q, z = (torch.randn(1, t, h, k, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, t, h, 2 * k, generator=g, dtype=torch.float64)
    log_decay, key = decay_and_key(z)
    expected = scan_chunked(q, key, v, log_decay, scale=k**-0.5)[0][0]
    twice = [x[0].repeat_interleave(2, dim=1) for x in (key, q, log_decay.exp())]
    halves = v[0].unflatten(-1, (2, k)).flatten(1, 2)
    y = square_gated_linear_attention(twice[0], halves, twice[1], twice[2], k**-0.5)
    assert (y.unflatten(1, (h, 2)).flatten(-2) - expected).abs().max() < 1e-12
