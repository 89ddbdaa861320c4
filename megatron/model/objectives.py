"""Training objectives: the next token everywhere, after a prefix, or JRT's mixture with masked tokens of the prefix.

    causal   mean cross entropy over all counted positions
    prefix   the same over positions after the prefix alone (classic prefix language model; JRT's `continual`)
    jrt      mean over positions after the prefix + weight * mean over the prefix's masked positions (arXiv 2407.05483, 3.3)

The two means of `jrt` are added, not averaged: the paper's formula divides by 1 + weight, the code that trained the released
models does not. `data/masking.py` builds the batches: labels of masked positions are the masked tokens themselves.

Each mean is over the counted tokens of the global batch, so that loss and gradient do not depend on how masked tokens are
distributed over micro batches and ranks: an engine counts them before a step (`global_divisors`, one all-reduce of one or two
numbers). With `mean_over: micro_batch` it is GPT-NeoX's mean of the micro batches' own means.

A context-parallel rank has a shard of every row and may have none of a term's tokens. It then computes the term over one token
of weight 0, so that all ranks run the same collectives and have a gradient for the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.data.micro_batch import MicroBatch
from megatron.errors import ConfigError
from megatron.model.accuracy import count_answers
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import Mesh

NAMES = ("causal", "prefix", "jrt")
MEANS = ("global_batch", "micro_batch")
MeanLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """An objective.

    Attributes:
        name: causal, prefix or jrt, see the module.
        prefix_length: tokens of the prefix.
        masked_weight: weight of the masked tokens' mean in `jrt`.
        count_answers: an evaluation counts the right answers of a synthetic task.
        mean_over: what each mean runs over, global_batch or micro_batch.
    """

    name: str = "causal"
    prefix_length: int = 0
    masked_weight: float = 0.25
    count_answers: bool = False
    mean_over: str = "global_batch"

    def __post_init__(self) -> None:
        if self.mean_over not in MEANS:
            raise ConfigError(f"unknown loss_mean_over '{self.mean_over}'", hint="one of " + ", ".join(MEANS))
        if self.name not in NAMES:
            raise ConfigError(f"unknown objective '{self.name}'", hint="one of " + ", ".join(NAMES))
        if self.name != "causal" and self.prefix_length < 1:
            raise ConfigError(
                f"objective '{self.name}' needs a prefix", hint="set objective_prefix_length or jrt_prefix_length"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the terms that are logged in addition to the loss."""
        return ("ntp_loss", "mlm_loss") if self.name == "jrt" else ()

    @property
    def places(self) -> tuple[slice, ...]:
        """Positions of a row that each term's mean is over."""
        after = slice(self.prefix_length, None)
        return {"causal": (slice(None),), "prefix": (after,), "jrt": (after, slice(0, self.prefix_length))}[self.name]

    def places_in(self, offset: int, length: int) -> list[slice]:
        """`places` among the tokens offset .. offset + length - 1 of a row, counted from the first of them; may be empty."""
        return [
            slice(*(min(max(end - offset, 0), length) for end in place.indices(offset + length)[:2])) for place in self.places
        ]


class LossParts:
    """Sums over micro batches of the parts that `objective_loss` returns, on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Clear the sums."""
        self._sums = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one micro batch."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def sums(self, names: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """One number per name [k]; zeros where nothing was added (pipeline stages without the loss)."""
        zero = torch.zeros((), device=device)
        return torch.stack([self._sums.get(name, zero).to(dtype) for name in names])


def counted(labels: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Total weight in fp64 of the tokens that count: labels [b, s] with -100 = ignored, loss_mask [b, s] of weights or None."""
    weights = (labels != -100).double()
    return (weights if loss_mask is None else weights * loss_mask).sum()


def counted_terms(objective: Objective, labels: Tensor, loss_mask: Tensor | None, offset: int = 0) -> Tensor:
    """`counted` of each term [terms]; `offset` is the place of the first token in its row."""
    places = objective.places_in(offset, labels.shape[1])
    return torch.stack([counted(labels[:, at], None if loss_mask is None else loss_mask[:, at]) for at in places])


def global_divisors(objective: Objective, batches: Sequence[MicroBatch], mesh: Mesh, device: torch.device) -> Tensor | None:
    """The divisor of each term's sum in every micro batch [terms], fp64; None for `mean_over: micro_batch`.

    Engines average over micro batches and data-parallel ranks; divided by this, that average is the mean over all counted
    tokens of the global batch. A collective of the data-parallel group, to which context-parallel ranks belong.

    Args:
        objective: the objective, whose terms are counted.
        batches: this rank's micro batches of the step, or its shards of them.
        mesh: the mesh, whose data-parallel ranks have the other micro batches and shards.
        device: device of the loss.
    """
    if objective.mean_over == "micro_batch":
        return None
    counts = torch.zeros(len(objective.places), dtype=torch.float64)
    for batch in batches:
        counts += counted_terms(objective, batch.labels, batch.loss_mask, batch.offset).cpu()
    total = all_reduce(counts.to(device), mesh.dp_group)
    return total / (len(batches) * mesh.dp)


def objective_loss(
    objective: Objective,
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    mean: MeanLoss,
    divisors: Tensor | None = None,
    group: ProcessGroup | None = None,
    offset: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro batch and its parts, which are detached and unweighted.

    Parts are the objective's terms where it has several, and with `count_answers` the counts of `model/accuracy.py` while
    gradients are off.

    Args:
        objective: the terms of the loss.
        logits: [b, s, n], or one rank's columns if `mean` expects them.
        labels: [b, s].
        loss_mask: [b, s] or None.
        mean: mean loss over the counted tokens of (logits, labels, loss_mask).
        divisors: [terms] from `global_divisors`; None divides each term by its own counted weight.
        group: tensor-parallel group that the columns of `logits` are split over; None for one device.
        offset: tokens of the row before these s, on a context-parallel rank.
    """
    counts: dict[str, Tensor] = {}
    if objective.count_answers and not torch.is_grad_enabled():
        at = slice(max(0, objective.prefix_length - offset), None)
        counts = count_answers(logits[:, at], labels[:, at], None if loss_mask is None else loss_mask[:, at], group)

    def term(number: int, at: slice) -> Tensor:
        y, w = labels[:, at], None if loss_mask is None else loss_mask[:, at]
        if not y.shape[1]:  # none of the term's tokens are in this shard
            at = slice(0, 1)
            y, w = labels[:, at], torch.zeros(labels[:, at].shape, device=labels.device)
        value = mean(logits[:, at], y, w)
        if divisors is None:
            return value
        return value * (counted(y, w) / divisors[number].clamp_min(1e-9)).to(value.dtype)

    terms = [term(number, at) for number, at in enumerate(objective.places_in(offset, labels.shape[1]))]
    if objective.name != "jrt":
        return terms[0], counts
    after, masked = terms
    parts = {"ntp_loss": after.detach(), "mlm_loss": masked.detach(), **counts}
    return after + objective.masked_weight * masked, parts
