"""Prepares prompts for a model: padded to one length, and, for prefix (JRT) models, filled up to the prefix's length.

A JRT model was trained on prefixes of one length and reads a shorter prompt better when the prefix is full (arXiv 2407.05483):

    plain       the prompt as it is
    left_pad    filler (GPT-2's space, id 220) in front up to the length; prefix layers hide the filler's keys, convolutions and
                windows read it, as the released `default_left_pad`
    read_twice  the prompt's own text in front, as often as it fits: it is read before it is read, and nothing is hidden

A prompt of at least the prefix's length is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("plain", "left_pad", "read_twice")
FILLER = 220


def fill_prompt(prompt: Sequence[int], mode: str, length: int, filler: int = FILLER) -> tuple[list[int], int]:
    """(tokens, how many of them in front are filler whose keys are to be hidden) of one prompt."""
    missing = length - len(prompt)
    if mode == "plain" or missing <= 0:
        return list(prompt), 0
    if mode == "left_pad":
        return [filler] * missing + list(prompt), missing
    repeats = -(-missing // len(prompt))
    return (list(prompt) * repeats)[len(prompt) * repeats - missing :] + list(prompt), 0


def left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """Prompts -> tokens [b, s] and mask [b, s] (1 = token); the mask is None when all prompts have one length."""
    longest = max(len(p) for p in prompts)
    rows = [[pad] * (longest - len(p)) + list(p) for p in prompts]
    tokens = torch.tensor(rows, dtype=torch.long, device=device)
    if all(len(p) == longest for p in prompts):
        return tokens, None
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return tokens, torch.tensor(mask, dtype=torch.long, device=device)


def filler_mask(fillers: Sequence[int], lengths: Sequence[int], device: torch.device | str) -> Tensor | None:
    """[b, s]: 0 for the filler in front of each left-padded row, 1 else; None when there is no filler."""
    if not any(fillers):
        return None
    longest = max(lengths)
    rows = [[1] * (longest - n) + [0] * f + [1] * (n - f) for f, n in zip(fillers, lengths, strict=True)]
    return torch.tensor(rows, dtype=torch.long, device=device)
