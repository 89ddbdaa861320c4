"""Next-token loss on one device; the vocabulary-parallel form is `parallel/loss.py`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the tokens that count, in fp32 (fp64 for fp64 logits).

    logits [b, s, n], labels [b, s] (-100 = ignored), loss_mask [b, s] of weights or None for all ones.
    """
    n = logits.shape[-1]
    wide = logits if logits.element_size() == 8 else logits.float()
    each = F.cross_entropy(wide.reshape(-1, n), labels.reshape(-1), reduction="none", ignore_index=-100)
    if loss_mask is None:
        return each.sum() / (labels != -100).sum()
    weights = loss_mask.reshape(-1).to(each.dtype)
    return (each * weights).sum() / weights.sum().clamp_min(1e-9)
