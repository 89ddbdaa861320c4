"""The grid that every mixer must pass, meshes of up to four ranks x ZeRO x recomputation x tied, and the job of a cell."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from megatron.engine.base import Engine, EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.schedule import learning_rate
from megatron.errors import ConfigError
from megatron.launch.environment import read_rank_environment
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.registry import layer_info, layer_names
from tests.engine.engine_cases import CURVE, GLOBAL, SEQ, micro_batches, model_config

MESHES = [(pp, tp, dp) for pp in (1, 2, 4) for tp in (1, 2, 4) for dp in (1, 2) if pp * tp * dp <= 4]
STEPS = 3


def mixers() -> list[str]:
    """Every registered mixer once, by its first name; a new file in `megatron/layers` is in the grid by itself."""
    return sorted({layer_info(name).names[0] for name in layer_names()})


@dataclass(frozen=True)
class Form:
    """What a cell varies besides mixer and mesh. dropout and sequence are off in the grid and used by tests beside it."""

    zero_stage: int = 1
    recompute: bool = False
    tied: bool = True
    dtype: str = "fp32"
    dropout: float = 0.0
    sequence: bool = False
    seed: int = 1234


FORMS = [Form(zero, recompute, tied) for zero in (0, 1) for recompute in (False, True) for tied in (True, False)]


def model(mixer: str, form: Form) -> ModelConfig:
    """The tiny model with that mixer in all four blocks."""
    return model_config(form.tied, layer_types=(mixer,) * 4, hidden_dropout=form.dropout)


def settings(form: Form) -> EngineSettings:
    """Two micro batches a step, clipping at work."""
    more = {"sequence_parallel": True} if form.sequence else {}
    return EngineSettings(
        seed=form.seed,
        dtype=form.dtype,
        gradient_accumulation=2,
        gradient_clipping=0.5,
        zero_stage=form.zero_stage,
        activation_checkpoint_interval=int(form.recompute),
        seq_length=SEQ,
        **more,
    )


def _train(engine: Engine) -> dict[str, Any]:
    batches = micro_batches(engine.mesh)
    results = [engine.train_step(batches, learning_rate(step, CURVE)) for step in range(STEPS)]
    return {
        "losses": [float(r.loss) for r in results],
        "norms": [float(r.grad_norm) for r in results],
        "weights": {name: w.float().clone() for name, w in engine.weights().items()},
        "replicas": engine.replica_names,
        "coordinates": (engine.mesh.pp_rank, engine.mesh.dp_rank, engine.mesh.tp_rank),
        "cuts": {name: engine.specs[name].cut for name in engine.weights()},
    }


def cells(kind: str, mixer: str, pp: int, tp: int, forms: list[Form]) -> list[dict[str, Any] | str]:
    """On every rank: train each form of one mixer on one mesh; a refusal is given back as its text."""
    env = read_rank_environment()
    mesh = Mesh.create(pp, tp, env.world_size, env.rank)
    found: list[dict[str, Any] | str] = []
    for form in forms:
        try:
            made = replace(settings(form), micro_batch=GLOBAL // mesh.dp)
            engine = build_engine(kind, model(mixer, form), mesh, made, env.local_rank)
        except ConfigError as error:
            found.append(str(error))
            continue
        found.append(_train(engine))
        engine.close()
    return found


@functools.cache
def alone(mixer: str, form: Form) -> Any:
    """The referee's result: plain PyTorch in one process."""
    from tests.parallel.ranks import run_ranks

    plain = replace(form, zero_stage=0, sequence=False)
    if plain != form:
        return alone(mixer, plain)
    return run_ranks(cells, 1, "single", mixer, 1, 1, [form], connect=False)[0][0]
