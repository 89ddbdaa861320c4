"""Which stages of the model run on which pipeline rank: the one partition of training, evaluation and offline resharding.

Stages are numbered as in GPT-NeoX: 0 the embedding, 2 + i block i, then (one number is skipped) final norm and LM head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.stages import BlockStage, Stage

_DEFAULT_METHOD = "type:transformer|mlp"


def balanced_bounds(costs: Sequence[float], parts: int) -> list[int]:
    """Split a list into `parts` contiguous, non-empty parts: the least maximum cost, then the least sum of squares.

    Every part must have a positive cost, so entries of cost 0 (an embedding, a norm without weights) join their neighbours.

    Returns:
        `parts + 1` bounds, from 0 to `len(costs)`.

    Raises:
        ConfigError: there are fewer costly entries than parts.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    if sum(cost > 0 for cost in costs) < parts:
        raise ConfigError(
            f"{sum(cost > 0 for cost in costs)} layers cannot fill {parts} pipeline stages",
            hint="lower pipe_parallel_size or add layers",
        )
    smallest_peak = _best(total, parts, limit=None)[0]
    return _best(total, parts, limit=smallest_peak)[1]


def _best(total: Sequence[float], parts: int, limit: float | None) -> tuple[float, list[int]]:
    """Dynamic programme over (parts so far, end): the least peak (limit None), or the least sum of squares under a peak."""
    n = len(total) - 1
    table: list[tuple[float, list[int]] | None] = [(0.0, [0])] + [None] * n
    for _ in range(parts):
        new: list[tuple[float, list[int]] | None] = [None] * (n + 1)
        for start, before in enumerate(table):
            for end in range(start + 1, n + 1) if before is not None else ():
                cost = total[end] - total[start]
                if before is None or cost <= 0 or (limit is not None and cost > limit):
                    continue
                value = max(before[0], cost) if limit is None else before[0] + cost * cost
                known = new[end]
                if known is None or value < known[0]:
                    new[end] = (value, [*before[1], end])
        table = new
    best = table[n]
    assert best is not None
    return best


def stage_costs(method: str, stages: Sequence[Stage], config: ModelConfig) -> list[float]:
    """Weight of each stage in the partition, by NeoX's `pipe_partition_method`.

    `type:REGEX` counts the blocks whose class or mixer name matches (NeoX's default, `type:transformer|mlp`, counts every
    block); `parameters` counts parameters; `uniform` counts stages, including embedding, norm and output.

    Raises:
        ConfigError: unknown method, or a pattern that matches nothing.
    """
    word = method.lower()
    if word == "uniform":
        return [1.0] * len(stages)
    if word == "parameters":
        return [float(sum(p.numel() for p in stage.module.parameters())) for stage in stages]
    if not word.startswith("type:"):
        raise ConfigError(f"unknown pipe_partition_method '{method}'", hint="type:REGEX, uniform or parameters")
    pattern = re.compile(".*" if word == _DEFAULT_METHOD else method[5:], re.IGNORECASE)
    costs = [0.0] * len(stages)
    for i, stage in enumerate(stages):
        if isinstance(stage.module, BlockStage):
            mixer = config.layer_types[stage.index - 2]
            names = (mixer, type(stage.module).__name__, type(stage.module.body.token_mixer).__name__)
            costs[i] = float(any(pattern.search(name) for name in names))
    if not any(costs):
        raise ConfigError(f"pipe_partition_method '{method}' matches no layer", hint="use type:transformer|mlp or parameters")
    return costs


def block_bounds(num_layers: int, pp: int) -> list[int]:
    """Bounds of the blocks of `pp` pipeline ranks, `pp + 1` of them, by NeoX's default method: blocks in equal numbers.

    Raises:
        ConfigError: there are fewer blocks than ranks.
    """
    return balanced_bounds([1.0] * num_layers, pp)


def stage_ranks(stages: Iterable[int], num_layers: int, pp: int) -> dict[int, int]:
    """Stage number -> pipeline rank under `block_bounds`: stages before the blocks on the first, later ones on the last."""
    inner = block_bounds(num_layers, pp)[1:-1]
    return {stage: sum(stage - 2 >= bound for bound in inner) if stage < num_layers + 2 else pp - 1 for stage in stages}
