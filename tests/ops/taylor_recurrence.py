"""Taylor linear attention token by token in fp64, written from the paper's equations alone; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """[..., f] -> 1 | y | the products y_i y_j of i <= j, by their distance on a ring; y = x / f^(1/4), squares over sqrt 2."""
    f = x.shape[-1]
    y = x / f**0.25
    columns = [torch.ones_like(y[..., 0])] + [y[..., i] for i in range(f)] + [y[..., i] ** 2 / 2**0.5 for i in range(f)]
    pairs = {(i, i) for i in range(f)}
    for distance in range(1, f):
        for i in range(f):
            j = (i + distance) % f
            if (min(i, j), max(i, j)) not in pairs:
                pairs.add((min(i, j), max(i, j)))
                columns.append(y[..., i] * y[..., j])
    return torch.stack(columns, -1)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    keep: Tensor | None = None,
    log_decay: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer's operator.

    Args:
        q: [b, t, h, f], fp64 as everything.
        k: [b, t, h, f].
        v: [b, t, h, v].
        state: [b, h, e, v + 1] or None; the last column is the denominator's.
        keep: weights of the keys, [b, t], or None.
        log_decay: of the numerators, [1 or b, t, h], or None.
        documents: numbers [b, t] or None.

    Returns:
        sums [b, t, h, v + 1], numerators and denominators, and the last state.
    """
    b, t, h, _ = q.shape
    phi_q, phi_k = packed(q), packed(k)
    s = q.new_zeros(b, h, phi_k.shape[-1], v.shape[-1] + 1) if state is None else state
    sums = []
    for i in range(t):
        if documents is not None and i > 0:
            s = s * (documents[:, i] == documents[:, i - 1]).double()[:, None, None, None]
        if log_decay is not None:
            decay = torch.exp(log_decay[:, i])[..., None, None].expand(-1, -1, 1, v.shape[-1])
            s = s * torch.cat([decay, torch.ones_like(decay[..., :1])], -1)
        u = torch.cat([v[:, i], torch.ones_like(v[:, i, :, :1])], -1)
        if keep is not None:
            u = u * keep[:, i, None, None]
        s = s + phi_k[:, i].unsqueeze(-1) * u.unsqueeze(-2)
        sums.append(torch.einsum("bhe,bhev->bhv", phi_q[:, i], s))
    return torch.stack(sums, 1), s
