"""The MetaLA operator: gate, key, decay, scan, self-augmentation, per-head norm and output gate as one function.

`ops/metala/reference.py` has the formulas and the shapes. Inputs are tensors of their own (`metala`) or views of one packed
projection (`metala_packed`); `ops/metala/projections.py` forms them in the way that suits the path.
"""

from __future__ import annotations

from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.metala.chunk import metala_chunked
from megatron.ops.metala.inputs import MetaLAInputs, cut_packed
from megatron.ops.metala.reference import decay_and_key, finish_metala
from megatron.ops.precision import in_accumulation_dtype, sum_dtype
from megatron.ops.scan.chunk import scan_chunked


@path("metala", "torch")
def metala_torch(x: MetaLAInputs) -> tuple[Tensor, Tensor]:
    """The chunked form. Masks and rounding, used in scoring, go through the pieces under autograd."""
    if not x.q.numel():  # no rows or no tokens
        b, _, h, k = x.q.shape
        return x.v * x.g, x.v.new_zeros(b, h, k, x.v.shape[-1], dtype=sum_dtype(x.v.dtype)) if x.state is None else x.state
    if x.mask is None and x.gate_round == "none":
        return metala_chunked(x.q, x.z, x.v, x.g, x.w, x.state, x.segment_ids)
    log_decay, key = decay_and_key(x.z, x.gate_round, x.mask)
    q, v = in_accumulation_dtype(x.q), in_accumulation_dtype(x.v)
    o, final = scan_chunked(q, key, v, log_decay, scale=x.scale, state=x.state, segment_ids=x.segment_ids)
    return finish_metala(o, q, key, v, x.g, in_accumulation_dtype(x.w)).to(x.v.dtype), final


def metala(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    g: Tensor,
    w: Tensor,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    gate_round: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The operator on tensors of their own; arguments as the fields of `MetaLAInputs`, v masked where `mask` is 0.

    Returns:
        y [b, s, h, v] in v's dtype, and the state after the last token [b, h, k, v].
    """
    return choose("metala", backend, q.device)(MetaLAInputs(q, z, v, g, w, state, mask, segment_ids, gate_round))


def metala_packed(
    packed: Tensor,
    w: Tensor,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    gate_round: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`metala` of one tensor `packed [b, s, h (2k + 2v)]` that holds q | z | v | g; w [h, k] says how it is cut.

    v need not be masked: a padded token's key is 0, and without a key its value reaches nothing but its own, unread output.
    """
    x = MetaLAInputs(*cut_packed(packed, w), w, state, mask, segment_ids, gate_round, packed)
    return choose("metala", backend, packed.device)(x)
