"""The grid that every mixer must pass, meshes of up to four ranks x ZeRO x recomputation x tied, and the job of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from megatron.engine.base import Engine, EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.schedule import learning_rate
from megatron.errors import ConfigError
from megatron.launch.environment import read_rank_environment
from megatron.model.config import ModelConfig
from megatron.model.objectives import Objective
from megatron.parallel.mesh import Mesh
from megatron.registry import layer_info, layer_names
from megatron.training.micro_batches import take_micro_batches
from tests.engine.engine_cases import CURVE, GLOBAL, SEQ, for_step, join, micro_batches, model_config
from tests.parallel.ranks import run_ranks

MESHES = [(pp, tp, dp) for pp in (1, 2, 4) for tp in (1, 2, 4) for dp in (1, 2) if pp * tp * dp <= 4]
STEPS = 3
# fp32 sums in another order: 1e-7 relative, grown by three steps. Adam divides by the root of tiny second moments, so rounding
# of 1e-7 in a gradient may move a weight by a hundredth of a step (lr 1e-2).
LOSS, NORM, WEIGHT = 1e-5, 1e-4, 2e-4
# bf16 rounds activations to 8 bits, differently for each layout; masters and gradient sums are fp32: losses within 0.5 %.
LOSS_BF16 = 5e-3


def mixers() -> list[str]:
    """Every registered mixer once, by its first name; a new file in `megatron/layers` is in the grid by itself."""
    return sorted({layer_info(name).names[0] for name in layer_names()})


@dataclass(frozen=True)
class Form:
    """What a cell varies besides mixer and mesh. dropout and bf16 are used by tests beside the grid.

    layers: of the model, all with the cell's mixer.
    batch: even masks; `masked`, rows with none to all of their tokens counted; `packed`, that and two documents in a row;
    `jrt`, uneven masks under the compound objective, after a third of the row; `documents`, uneven masks and documents of all
    lengths.
    cp: context-parallel ranks of the data-parallel ones.
    short: windows of 5 tokens, and jrt layers with a prefix where the objective has one.
    learned: learned positions.
    steps: of training, and micro batches of the evaluation after them.
    lr: the largest learning rate of the schedule.
    """

    zero_stage: int = 1
    recompute: bool = False
    tied: bool = True
    dtype: str = "fp32"
    dropout: float = 0.0
    sequence: bool = False
    seed: int = 1234
    batch: str = "even"
    layers: int = 4
    cp: int = 1
    mean_over: str = "global_batch"
    chunk: int = 0
    backend: str = "auto"
    exchange: str = "all_gather"
    short: bool = False
    learned: bool = False
    steps: int = STEPS
    lr: float = CURVE.lr


BATCHES = ("even", "masked", "packed", "jrt")
FORMS = [Form(zero, recompute, tied) for zero in (0, 1) for recompute in (False, True) for tied in (True, False)]
Mesh3 = tuple[int, int, int]  # pipeline, tensor, data
Cell = tuple[str, Form]  # on a mesh


def possible(mixer: str, mesh: Mesh3, form: Form) -> bool:
    """ZeRO-2 and 3 need a single stage, ZeRO-3 all logits at once; a cut sequence needs tensor ranks, and no mixer that sums
    over them inside; context-parallel ranks are data-parallel ranks."""
    staged = form.zero_stage < 2 or mesh[0] == 1
    gathered = form.zero_stage < 3 or not form.chunk
    return staged and gathered and mesh[2] % form.cp == 0 and (not form.sequence or (mesh[1] > 1 and "mamba" not in mixer))


def every_form() -> list[Form]:
    """All choices of the grid, ZeRO-2, 3 and cut sequences among them."""
    return [
        replace(form, zero_stage=form.zero_stage + more, sequence=cut, batch=batch)
        for form in FORMS
        for more in (0, 2)
        for cut in (False, True)
        for batch in BATCHES
    ]


def covering(meshes: list[Mesh3], names: list[str], every: list[Form], choices: Sequence[str]) -> dict[Mesh3, list[Cell]]:
    """One form for each mixer on each mesh, or more, so that every possible pair of choices (fields of a form) is in a cell."""
    pairs = {
        (mixer, mesh): {form: _pairs(mixer, mesh, form, choices) for form in every if possible(mixer, mesh, form)}
        for mesh in meshes
        for mixer in names
    }
    left = set().union(*(own for cell in pairs.values() for own in cell.values()))
    chosen: dict[Mesh3, list[Cell]] = {}
    for (mixer, mesh), forms in pairs.items():
        best = max(forms, key=lambda form: len(left & forms[form]))
        left -= forms[best]
        chosen.setdefault(mesh, []).append((mixer, best))
    while left:
        (mixer, mesh), best = max(
            ((cell, form) for cell, forms in pairs.items() for form in forms), key=lambda one: len(left & pairs[one[0]][one[1]])
        )
        left -= pairs[mixer, mesh][best]
        chosen[mesh].append((mixer, best))
    return chosen


def _pairs(mixer: str, mesh: Mesh3, form: Form, choices: Sequence[str]) -> set[tuple[Any, Any]]:
    """Every two choices that meet in a cell."""
    return set(combinations((mixer, mesh, *((name, getattr(form, name)) for name in choices)), 2))


def model(mixer: str, form: Form) -> ModelConfig:
    """The tiny model with that mixer in all blocks; several joined by + take turns, in at least as many blocks."""
    names = mixer.split("+")
    types = tuple(names[i % len(names)] for i in range(max(form.layers, len(names))))
    options = {"sliding": {"window": 5}, "jrt": {"prefix_length": SEQ // 3 if form.batch == "jrt" else 0}}
    changes: dict[str, Any] = {"learned_positions": SEQ} if form.learned else {}
    changes |= {"layer_options": {name: options[name] for name in names if name in options}} if form.short else {}
    return model_config(form.tied, num_layers=len(types), layer_types=types, hidden_dropout=form.dropout, **changes)


def settings(form: Form) -> EngineSettings:
    """Two micro batches a step, clipping at work."""
    more: dict[str, Any] = {"sequence_parallel": True} if form.sequence else {}
    if form.batch == "jrt":
        more["objective"] = Objective("jrt", prefix_length=SEQ // 3, mean_over=form.mean_over)
    elif form.mean_over != "global_batch":
        more["objective"] = Objective(mean_over=form.mean_over)
    return EngineSettings(
        seed=form.seed,
        dtype=form.dtype,
        gradient_accumulation=2,
        gradient_clipping=0.5,
        zero_stage=form.zero_stage,
        activation_checkpoint_interval=int(form.recompute),
        seq_length=SEQ,
        loss_chunk_tokens=form.chunk,
        kernel_backend=form.backend,
        context_parallel_exchange=form.exchange,
        **more,
    )


def _train(engine: Engine, form: Form) -> dict[str, Any]:
    how: dict[str, Any] = {"segments": form.batch == "packed", "masks": "even" if form.batch == "even" else "uneven"}
    how["ids"] = "documents" if form.batch == "documents" else ""
    batches = micro_batches(engine.mesh, **how)
    results, parts = [], []
    curve = replace(CURVE, lr=form.lr, min_lr=form.lr / 10)
    for step in range(form.steps):
        results.append(engine.train_step(for_step(engine, batches), learning_rate(step, curve)))
        parts += list(engine.loss_parts.values())
    held_out = engine.eval_loss(take_micro_batches(micro_batches(engine.mesh, start=1000, **how), form.steps)).loss
    return {
        "losses": [*(float(r.loss) for r in results), *parts, held_out],
        "norms": [float(r.grad_norm) for r in results],
        "weights": {name: w.float().clone() for name, w in engine.weights().items()},
        "replicas": engine.replica_names,
        "coordinates": (engine.mesh.pp_rank, engine.mesh.dp_rank, engine.mesh.tp_rank),
        "cuts": {name: engine.specs[name].cut for name in engine.weights()},
    }


def cells(kind: str, pp: int, tp: int, work: list[Cell]) -> list[dict[str, Any] | str]:
    """On every rank: train each cell on one mesh; a refusal is given back as its text."""
    env = read_rank_environment()
    grids = {cp: Mesh.create(pp, tp, env.world_size, env.rank, cp=cp) for cp in sorted({form.cp for _, form in work})}
    found: list[dict[str, Any] | str] = []
    for mixer, form in work:
        mesh = grids[form.cp]
        try:
            made = replace(settings(form), micro_batch=GLOBAL // mesh.data_size)
            engine = build_engine(kind, model(mixer, form), mesh, made, env.local_rank)
        except ConfigError as error:
            found.append(str(error))
            continue
        found.append(_train(engine, form))
        engine.close()
    return found


_ALONE: dict[Cell, Any] = {}


def alone(work: list[Cell]) -> list[Any]:
    """The reference's results: plain PyTorch in one process, each cell once."""
    plain = [
        (mixer, replace(form, zero_stage=0, sequence=False, cp=1, exchange="all_gather", backend="auto"))
        for mixer, form in work
    ]
    missing = [cell for cell in dict.fromkeys(plain) if cell not in _ALONE]
    if missing:
        _ALONE.update(zip(missing, run_ranks(cells, 1, "single", 1, 1, missing, connect=False, timeout=300)[0], strict=True))
    return [_ALONE[cell] for cell in plain]


@dataclass(frozen=True)
class Difference:
    """Largest difference of a cell from one process: losses and norms relative, weights absolute."""

    loss: float
    norm: float
    weight: float


def compare(got: list[dict[str, Any]], want: dict[str, Any]) -> Difference:
    """All ranks' results of a cell against the reference's; every rank must report the same numbers."""
    for rank in got:
        assert (rank["losses"], rank["norms"]) == (got[0]["losses"], got[0]["norms"]), "ranks report different numbers"
    whole = join(got)
    assert set(whole) == set(want["weights"])
    worst = max((whole[name] - w).abs().max().item() for name, w in want["weights"].items())
    return Difference(relative(got[0]["losses"], want["losses"]), relative(got[0]["norms"], want["norms"]), worst)


def relative(a: list[float], b: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def run_cells(mesh: Mesh3, work: list[Cell], timeout: float = 300) -> list[Difference | str]:
    """Train cells on a mesh of real ranks; how far each is from one process, or why it was refused."""
    pp, tp, dp = mesh
    results = run_ranks(cells, pp * tp * dp, "deepspeed", pp, tp, work, connect=pp * tp * dp > 1, timeout=timeout)
    found: list[Difference | str] = []
    for i, want in enumerate(alone(work)):
        got = [rank[i] for rank in results]
        found.append(got[0] if isinstance(got[0], str) else compare(got, want))
    return found
