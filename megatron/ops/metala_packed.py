"""The MetaLA operator over one packed projection q | z | v | g: the plain forms cut it and run `ops/metala.py`."""

from __future__ import annotations

from torch import Tensor

from megatron.ops.dispatch import choose, path
from megatron.ops.metala import metala_reference, metala_torch
from megatron.ops.packed import cut_packed


@path("metala_packed", "reference")
def metala_packed_reference(
    packed: Tensor, w: Tensor, state: Tensor | None, mask: Tensor | None, segment_ids: Tensor | None, gate_round: str
) -> tuple[Tensor, Tensor]:
    """`metala_reference` of the pieces."""
    return metala_reference(*cut_packed(packed, w), w, state, mask, segment_ids, gate_round)


@path("metala_packed", "torch")
def metala_packed_torch(
    packed: Tensor, w: Tensor, state: Tensor | None, mask: Tensor | None, segment_ids: Tensor | None, gate_round: str
) -> tuple[Tensor, Tensor]:
    """`metala_torch` of the pieces."""
    return metala_torch(*cut_packed(packed, w), w, state, mask, segment_ids, gate_round)


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
    return choose("metala_packed", backend, packed.device)(packed, w, state, mask, segment_ids, gate_round)
