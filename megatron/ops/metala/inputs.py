"""What every path of the MetaLA operator reads, as one value; `ops/metala/reference.py` has the formulas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


def cut_packed(packed: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views q, z [..., h, k] and v, g [..., h, v] of `packed [..., h (2k + 2v)]`; h and k are those of `w [h, k]`."""
    h, k = w.shape
    v = packed.shape[-1] // (2 * h) - k
    q, z, values, gate = packed.split([h * k, h * k, h * v, h * v], dim=-1)
    return q.unflatten(-1, (h, k)), z.unflatten(-1, (h, k)), values.unflatten(-1, (h, v)), gate.unflatten(-1, (h, v))


class MetaLAInputs(NamedTuple):
    """Inputs of a pass over `s` tokens.

    Attributes:
        q: queries, [b, s, h, k].
        z: gate logits, [b, s, h, k].
        v: values, [b, s, h, v].
        g: output-gate logits, [b, s, h, v].
        w: self-augmentation vector, [h, k].
        state: state before the first token, [b, h, k, v] in fp32 (fp64 for fp64 inputs); None for zeros.
        mask: [b, s], 0 at padding, where the state is neither decayed nor written; None for none.
        segment_ids: document numbers, [b, s], never repeated after a change; None for one document per row.
        gate_round: none | bf16 | fp16: the format through which gate and key are rounded.
        packed: [b, s, h (2k + 2v)], of which q, z, v and g are views; None where they are tensors of their own. A fused path
            returns a single gradient for it.
    """

    q: Tensor
    z: Tensor
    v: Tensor
    g: Tensor
    w: Tensor
    state: Tensor | None = None
    mask: Tensor | None = None
    segment_ids: Tensor | None = None
    gate_round: str = "none"
    packed: Tensor | None = None

    @property
    def scale(self) -> float:
        """Of the scores: k^-0.5."""
        return float(self.q.shape[-1] ** -0.5)
