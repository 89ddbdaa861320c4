"""What every path of Taylor attention reads, as one value; `ops/taylor/operator.py` has the formulas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron.ops.precision import sum_dtype
from megatron.ops.taylor.features import feature_count


class TaylorInputs(NamedTuple):
    """Inputs of a pass over `s` tokens, in the order in which the custom operators take them.

    Args:
        q: queries, [b, s, h, f].
        k: keys, [b, s, h, f].
        v: values, [b, s, h, v].
        keep: [b, s], 0 for tokens that are not there (padding); None for none.
        log_decay: [1 or b, s, h], constants; None for no decay.
        segment_ids: document numbers, [b, s]; the state is emptied where they change; None for one document per row.
        state: state before the first token, [b, h, e, v + 1]; None for zeros.
        divide: whether the results are quotients, or the sums of numerators and denominator.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None = None
    log_decay: Tensor | None = None
    segment_ids: Tensor | None = None
    state: Tensor | None = None
    divide: bool = True

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Uninitialised y [b, s, h, v] in v's dtype (sums [b, s, h, v + 1]) and last state [b, h, e, v + 1]."""
        b, s, h, f = self.q.shape
        width, wide = self.v.shape[-1], sum_dtype(self.v.dtype)
        y = self.v.new_empty(b, s, h, width) if self.divide else self.v.new_empty(b, s, h, width + 1, dtype=wide)
        return y, self.q.new_empty(b, h, feature_count(f), width + 1, dtype=sum_dtype(self.q.dtype))
