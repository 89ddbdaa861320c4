"""The four projections in front of the MetaLA operator, as one matrix product where possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron.ops.dispatch import chosen
from megatron.ops.metala.inputs import cut_packed
from megatron.ops.metala.operator import metala, metala_packed
from megatron.ops.metala.summary import metala_summary
from megatron.ops.modules import are_plain
from megatron.ops.packed_linear.operator import packed_linear


class MetaLAProjections(NamedTuple):
    """Maps from the mixer's input [..., d] to q and z [..., h k], v and g [..., h v]; only the last may have a bias."""

    q: nn.Linear
    z: nn.Linear
    v: nn.Linear
    g: nn.Linear

    @property
    def weights(self) -> Sequence[Tensor]:
        """The four matrices in the order of a packed projection."""
        return [linear.weight for linear in self]

    def by_head(self, u: Tensor, w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, z [..., h, k] and v, g [..., h, v] of u [..., d], by four calls of modules; h and k are those of `w [h, k]`.

        Args:
            u: input.
            w: self-augmentation vector.
            mask: [...], 0 at padding, where v becomes 0; None for none.
        """
        v = self.v(u)
        if mask is not None:
            v = v * mask[..., None].to(v.dtype)
        h, k = w.shape
        return (
            self.q(u).unflatten(-1, (h, k)),
            self.z(u).unflatten(-1, (h, k)),
            v.unflatten(-1, (h, -1)),
            self.g(u).unflatten(-1, (h, -1)),
        )

    def by_head_at_once(self, u: Tensor, w: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `by_head`, as views of one matrix product."""
        return cut_packed(packed_linear(u, self.weights, self.g.bias, backend), w)


def metala_projected(
    u: Tensor,
    projections: MetaLAProjections,
    w: Tensor,
    *,
    start: Callable[[Callable[[], tuple[Tensor, Tensor]]], Callable[[], Tensor | None]] = lambda summary: lambda: None,
    sharded: bool = False,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    gate_round: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The operator on projections of `u [b, s, d]`.

    They are one matrix product with a single gradient. `reference` and `fla` use four separate products, and so do projections
    that are more than plain matrices (adapters, quantised weights, hooks).

    Args:
        u: input, [b, s, d].
        projections: maps to q, z, v and g.
        w: self-augmentation vector, [h, k].
        start: waits for the state before the first token, [b, h, k, v]; called with a function that returns the summary of
            these tokens (context parallelism). None for zeros.
        sharded: `start` exchanges states: z and v, which it needs, are one product, and q and g, computed meanwhile, another.
        mask: as in `MetaLAInputs`.
        segment_ids: as in `MetaLAInputs`.
        gate_round: as in `MetaLAInputs`.
        backend: path of the operator and of the products.

    Returns:
        y [b, s, h, v] in v's dtype, and the state after the last token [b, h, k, v].
    """
    options: dict[str, Any] = {"mask": mask, "segment_ids": segment_ids, "gate_round": gate_round, "backend": backend}
    fused = are_plain(*projections) and chosen("metala", backend, u.device) in ("triton", "torch")
    if fused and not sharded:
        packed = packed_linear(u, projections.weights, projections.g.bias, backend)
        wait = start(lambda: metala_summary(*cut_packed(packed, w)[1:3], segment_ids, gate_round, backend))
        return metala_packed(packed, w, state=wait(), **options)
    if fused:
        z, v = _two_by_head(u, projections.z, projections.v, w.shape[0], backend)
        wait = start(lambda: metala_summary(z, v, segment_ids, gate_round, backend))
        q, g = _two_by_head(u, projections.q, projections.g, w.shape[0], backend)
    else:
        q, z, v, g = projections.by_head(u, w, mask)
        wait = start(lambda: metala_summary(z, v, segment_ids, gate_round, backend))
    return metala(q, z, v, g, w, state=wait(), **options)


def _two_by_head(u: Tensor, first: nn.Linear, second: nn.Linear, heads: int, backend: str) -> tuple[Tensor, Tensor]:
    """Two maps of u [b, s, d] as one matrix product, [b, s, h, k] and [b, s, h, v]; only the second may have a bias."""
    packed = packed_linear(u, (first.weight, second.weight), second.bias, backend)
    a, b = packed.split([first.weight.shape[0], second.weight.shape[0]], -1)
    return a.unflatten(-1, (heads, -1)), b.unflatten(-1, (heads, -1))
