"""Random numbers of a rank: where they start and how they are carried through a checkpoint.

Dropout on replicated activations must draw the same numbers on all tensor-parallel ranks and different ones on data-parallel
ranks and pipeline stages (GPT-NeoX repeats its masks over data-parallel ranks; we do not). So a rank's stream is a function of
(seed, stage, data rank) and not of the tensor rank. Initial weights do not depend on these streams: see `model/init.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh


def stream_seed(seed: int, mesh: Mesh) -> int:
    """The 32-bit seed of this rank's streams; equal on tensor-parallel ranks, distinct otherwise."""
    return int(np.random.SeedSequence((seed, mesh.pp_rank, mesh.dp_rank)).generate_state(1)[0])


def seed_all(seed: int, mesh: Mesh) -> None:
    """Seed Python's, numpy's and torch's generators (all devices of this process)."""
    value = stream_seed(seed, mesh)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def capture_rng() -> dict[str, Tensor]:
    """State of all generators of this process as CPU tensors (`python`, `numpy`, `torch`, and `cuda` on a GPU).

    The two Mersenne twisters are stored as float64: 32-bit words and the cached Gaussian are both exact there.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": torch.tensor([version, gauss is not None, gauss or 0.0, *words], dtype=torch.float64),
        "numpy": torch.tensor([position, has_gauss, cached, *np.asarray(keys).tolist()], dtype=torch.float64),
        "torch": torch.get_rng_state().clone(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().clone()
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Put the generators back where `capture_rng` found them.

    A state saved on a CPU leaves the GPU's generator as it is, and the reverse.

    Raises:
        CheckpointError: a generator's state is missing or has a wrong size; nothing was changed then.
    """
    check_rng(state)
    _restore(state, random.setstate, np.random.set_state, torch.set_rng_state)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def check_rng(state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` can be restored; tried on generators of its own."""
    try:
        _restore(state, random.Random().setstate, np.random.RandomState().set_state, torch.Generator().set_state)
    except (KeyError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"the saved random state cannot be restored: {error!r}") from error


def _restore(
    state: Mapping[str, Tensor], python: Callable[[Any], None], numpy: Callable[[Any], None], torch_: Callable[[Tensor], Any]
) -> None:
    """Give each generator, by its function that takes a state, what was captured."""
    version, has_gauss, gauss, *words = state["python"].tolist()
    python((int(version), tuple(int(w) for w in words), gauss if has_gauss else None))
    position, has_gauss, cached, *keys = state["numpy"].tolist()
    numpy(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch_(state["torch"])
