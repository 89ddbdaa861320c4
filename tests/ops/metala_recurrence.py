"""MetaLA token by token in fp64, written from the paper's equations and from nothing else of this tree; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer's operator.

    Args:
        q: [b, t, h, k], fp64 as everything.
        z: gate logits, [b, t, h, k].
        v: [b, t, h, v].
        g: output gate, [b, t, h, v].
        w: self-augmentation, [h, k].
        state: [b, h, k, v] or None.
        documents: numbers [b, t] or None.
        mask: [b, t], 0 at padding, or None.

    Returns:
        y [b, t, h, v] and the last state.
    """
    b, t, h, k = q.shape
    s = torch.zeros(b, h, k, v.shape[-1], dtype=torch.float64) if state is None else state
    outputs = []
    for i in range(t):
        log_decay = -(torch.relu(-z[:, i]) + torch.log1p(torch.exp(-z[:, i].abs()))) / 16.0  # log sigmoid, sixteenth root
        decay, key = torch.exp(log_decay), -torch.expm1(log_decay)
        if mask is not None:
            keep = mask[:, i].double()[:, None, None]
            decay, key = decay * keep + (1 - keep), key * keep
        if documents is not None and i > 0:
            s = s * (documents[:, i] == documents[:, i - 1]).double()[:, None, None, None]
        s = decay.unsqueeze(-1) * s + key.unsqueeze(-1) * v[:, i].unsqueeze(-2)
        r = torch.einsum("bhk,bhkv->bhv", q[:, i], s) * k**-0.5
        r = r + torch.sigmoid((q[:, i] * key * w).sum(-1, keepdim=True) * v[:, i])
        centred = r - r.mean(-1, keepdim=True)
        n = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        outputs.append(n * g[:, i] * torch.sigmoid(g[:, i]))
    return torch.stack(outputs, 1), s
