"""The grid of context parallelism: every ready mixer and two hybrids, on meshes of up to four ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from megatron.registry import layer_info
from tests.engine.grid_cases import Cell, Form, Mesh3, covering, mixers, possible

HYBRIDS = ["metala+based+sliding+base_conv", "jrt+mamba+alibi+metala"]
MESHES: list[Mesh3] = [(1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2)]
SIZES = (2, 4)
BATCHES = ("documents", "masked", "jrt")
# A usual learning rate instead of the other grid's 1e-2: what Adam makes of rounding is proportional to it, and so all that is
# compared is within 1e-5, losses and norms relative, weights absolute.
LR, LIMIT = 1e-3, 1e-5
CHOICES = ("zero_stage", "recompute", "batch", "cp", "exchange", "sequence", "chunk", "mean_over")


def names() -> list[str]:
    """Every mixer that declares `context_parallel`, and the hybrids."""
    return [name for name in mixers() if layer_info(name).context_parallel] + HYBRIDS


def whole_grid(mesh: Mesh3) -> list[Cell]:
    """All cells of a mesh: ZeRO x recomputation x batches x context-parallel size; the exchanges take turns."""
    forms = [
        Form(zero, recompute, batch=batch, cp=size, short=True, layers=2, lr=LR)
        for zero, recompute, batch, size in product((0, 1, 2, 3), (False, True), BATCHES, SIZES)
    ]
    cells = [(name, form) for name in names() for form in forms if possible(name, mesh, form)]
    return [(name, replace(form, exchange=("all_gather", "scan")[at % 2])) for at, (name, form) in enumerate(cells)]


def bf16_cells(mesh: Mesh3) -> list[Cell]:
    """Every mixer with fp32 masters and sums: ZeRO 1 and 3, recomputed in one of them."""
    forms = [
        Form(zero, zero == 3, dtype="bf16", batch="documents", cp=size, short=True, layers=2)
        for zero, size in product((1, 3), SIZES)
    ]
    return [(name, form) for name in names() for form in forms if possible(name, mesh, form)]


def subset() -> dict[Mesh3, list[Cell]]:
    """One or two cells for each mixer on each mesh, in which any two choices meet."""
    forms = [
        Form(
            zero,
            recompute,
            batch=batch,
            cp=size,
            exchange=exchange,
            sequence=cut,
            chunk=chunk,
            mean_over=mean,
            short=True,
            layers=2,
            lr=LR,
        )
        for zero, recompute, batch, size, exchange, cut, chunk, mean in product(
            (0, 1, 2, 3),
            (False, True),
            BATCHES,
            SIZES,
            ("all_gather", "scan"),
            (False, True),
            (0, 5),
            ("global_batch", "micro_batch"),
        )
    ]
    return covering(MESHES, names(), forms, CHOICES)
