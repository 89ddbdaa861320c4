"""Random numbers across a resume: restored bitwise where a rank's role is the same, begun again by a fixed rule elsewhere.

A rank's streams belong to its role (pipeline stage, data rank) and are equal on tensor ranks (`parallel/random.py`). So they
are restored whenever the pipeline and data sizes are those of the save, whatever the tensor size. On another mesh there is
nothing to restore: the streams start from (seed, step, stage, data rank), the same on every resume of that step.
"""

from __future__ import annotations

import logging

import numpy as np

from megatron.checkpoint.layout import rng_file
from megatron.checkpoint.manifest import Manifest
from megatron.parallel.mesh import Mesh, rank_of
from megatron.parallel.random import seed_all

_log = logging.getLogger(__name__)


def mesh_text(manifest: Manifest, mesh: Mesh) -> str:
    """`saved on pp 2 x dp 1 x tp 2, this run is pp 1 x dp 1 x tp 4`; empty when the meshes are equal."""
    saved = manifest.mesh
    if dict(saved) == {"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp}:
        return ""
    then = " x ".join(f"{axis} {size}" for axis, size in saved.items())
    return f"saved on {then}, this run is pp {mesh.pp} x dp {mesh.dp} x tp {mesh.tp}"


def saved_streams(manifest: Manifest, mesh: Mesh) -> str | None:
    """The file with this rank's streams, None when there is none for its role."""
    saved = manifest.mesh
    if (saved["pp"], saved["dp"]) != (mesh.pp, mesh.dp):
        return None
    tp_rank = mesh.tp_rank if saved["tp"] == mesh.tp else 0
    file = rng_file(rank_of(mesh.pp_rank, mesh.dp_rank, tp_rank, dp=saved["dp"], tp=saved["tp"]))
    return file if file in manifest.files else None


def begin_streams(manifest: Manifest, seed: int, mesh: Mesh) -> None:
    """Seed all generators from (seed, step, stage, data rank), and say so."""
    seed_all(int(np.random.SeedSequence((seed, manifest.iteration)).generate_state(1)[0]), mesh)
    if mesh.rank == 0:
        why = mesh_text(manifest, mesh) or "they were not saved (no_save_rng)"
        step = manifest.iteration
        _log.warning("random numbers start again from seed %d, step %d and the rank: %s", seed, step, why)
