"""What a model is trained for: the next token everywhere, after a prefix, or JRT's mixture with masked tokens of the prefix.

    causal   mean cross entropy over all counted positions
    prefix   the same over positions after the prefix alone (classic prefix language model; JRT's `continual`)
    jrt      mean over positions after the prefix + weight * mean over the prefix's masked positions (arXiv 2407.05483, 3.3)

The two means of `jrt` are added, not averaged: the paper's formula divides by 1 + weight, the code that trained the released
models does not. `data/masking.py` makes the batches: labels of masked positions are the hidden tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.training.accuracy import Tally

NAMES = ("causal", "prefix", "jrt")
MeanLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """An objective. prefix_length: tokens of the prefix; masked_weight: of the masked tokens' mean in `jrt`.

    tally: counts right answers in evaluations, where they are asked for.
    """

    name: str = "causal"
    prefix_length: int = 0
    masked_weight: float = 0.25
    tally: Tally | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"unknown objective '{self.name}'", hint="one of " + ", ".join(NAMES))
        if self.name != "causal" and self.prefix_length < 1:
            raise ConfigError(
                f"objective '{self.name}' needs a prefix", hint="set objective_prefix_length or jrt_prefix_length"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is logged beside the loss."""
        return ("ntp_loss", "mlm_loss") if self.name == "jrt" else ()


class LossParts:
    """Sums of an objective's parts over the micro batches of a step, on the device."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget what has been added."""
        self._sums = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Count one micro batch."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def sums(self, device: torch.device) -> Tensor:
        """One number per name [k]; zeros where nothing was added (pipeline stages without the loss)."""
        zero = torch.zeros((), device=device)
        return torch.stack([self._sums.get(name, zero).float() for name in self.names])


def objective_loss(
    objective: Objective, logits: Tensor, labels: Tensor, loss_mask: Tensor | None, mean: MeanLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its parts, detached and unweighted).

    Args:
        logits: [b, s, n], or one rank's columns where `mean` knows that. labels: [b, s]. loss_mask: [b, s] or None.
        mean: mean loss over the counted tokens of (logits, labels, loss_mask).
    """
    if objective.tally is not None:
        at = slice(objective.prefix_length, None)
        objective.tally.look(logits[:, at], labels[:, at], None if loss_mask is None else loss_mask[:, at])
    if objective.name == "causal":
        return mean(logits, labels, loss_mask), {}
    m = objective.prefix_length

    def part(at: slice) -> Tensor:
        return mean(logits[:, at], labels[:, at], None if loss_mask is None else loss_mask[:, at])

    after = part(slice(m, None))
    if objective.name == "prefix":
        return after, {}
    masked = part(slice(0, m))
    parts = {"ntp_loss": after.detach(), "mlm_loss": masked.detach()}
    return after + objective.masked_weight * masked, parts
