"""Random number generators of a rank: their seeds, and their states in a checkpoint.

Dropout on replicated activations must draw the same numbers on all tensor-parallel ranks and different ones on data-parallel
ranks and pipeline stages (GPT-NeoX repeats its masks over data-parallel ranks; we do not). So a rank's seed is a function of
(seed, stage, data-parallel rank), not of the tensor-parallel rank. Initial weights do not depend on it: see `model/init.py`.
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
    """The 32-bit seed of this rank's generators; equal on tensor-parallel ranks, distinct otherwise."""
    return int(np.random.SeedSequence((seed, mesh.pp_rank, mesh.dp_rank)).generate_state(1)[0])


def seed_all(seed: int, mesh: Mesh) -> None:
    """Seed Python's, numpy's and torch's generators (all devices of this process)."""
    value = stream_seed(seed, mesh)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def capture_rng() -> dict[str, Tensor]:
    """States of all generators of this process as CPU tensors (`python`, `numpy`, `torch`, and `cuda` on a GPU).

    The two Mersenne twisters are stored as float64, where both 32-bit words and the cached Gaussian are exact.
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
    """Restore the generators to a state of `capture_rng`.

    A state saved on a CPU does not change the GPU's generator, and vice versa.

    Raises:
        CheckpointError: a generator's state is missing or invalid; no generator was changed.
    """
    check_rng(state)
    _restore(state, random.setstate, np.random.set_state, torch.set_rng_state)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def check_rng(state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` can be restored; it is tried on temporary generators."""
    try:
        _restore(state, random.Random().setstate, np.random.RandomState().set_state, torch.Generator().set_state)
    except (KeyError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"the saved random state cannot be restored: {error!r}") from error


def _restore(
    state: Mapping[str, Tensor], python: Callable[[Any], None], numpy: Callable[[Any], None], torch_: Callable[[Tensor], Any]
) -> None:
    """Pass the captured states to the `set_state` functions of the three generators."""
    version, has_gauss, gauss, *words = state["python"].tolist()
    python((int(version), tuple(int(w) for w in words), gauss if has_gauss else None))
    position, has_gauss, cached, *keys = state["numpy"].tolist()
    numpy(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch_(state["torch"])
