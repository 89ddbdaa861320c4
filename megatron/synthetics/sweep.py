"""A sweep over small models on synthetic tasks: the grid of a YAML as points, and a worker that runs what is open of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron.errors import ConfigError
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.registry import layer_info, nearest
from megatron.synthetics.dataset import read_slices
from megatron.synthetics.sweep_results import Results
from megatron.synthetics.train_point import Point, Training, run_point

SECTIONS = ("data", "model", "training", "families")
MODEL: dict[str, Any] = {"num_heads": 1, "norm": "layernorm", "norm_eps": 1e-5, "mlp": "none", "tie_embeddings": True}
"""Zoology's blocks: LayerNorm, a mixer and nothing else, a tied output projection."""
_MODEL_FIELDS = {f.name for f in fields(ModelConfig)} - {"vocab_size", "num_layers", "layer_types", "layer_options"}
_TRAINING_FIELDS = {f.name for f in fields(Training)}


def points_of(sweep: Mapping[str, Any]) -> list[Point]:
    """All points of a sweep in the order of its families; the rates of one model stand together.

    Args:
        sweep: `data` (see `read_slices`); `model` and `training`, values for all families; `families`, each with a `name`, the
            `layers` (mixers from the first to the last), and any field of the model, of the training, or option of a mixer
            (`based_feature_width`). A list of values is a grid.

    Raises:
        ConfigError: something is unknown or missing, or describes no model.
    """
    for name in sweep:
        if name not in SECTIONS:
            raise ConfigError(f"a sweep has no section '{name}'", hint="its sections: " + ", ".join(SECTIONS))
    families = sweep.get("families")
    if not isinstance(families, Sequence) or isinstance(families, str) or not families:
        raise ConfigError("the sweep names no families", hint="families: [{name: ..., layers: [...], hidden_size: [...]}]")
    data = sweep.get("data")
    if not isinstance(data, Mapping):
        raise ConfigError("the sweep has no data", hint="data: {task: mqar, train: [...], test: [...]}")
    for split in ("train", "test"):
        read_slices(data, split)
    points: dict[str, Point] = {}
    for family in families:
        for point in _family(sweep, data, family):
            points.setdefault(point.key(), point)
    return list(points.values())


def _family(sweep: Mapping[str, Any], data: Mapping[str, Any], family: Any) -> Iterator[Point]:
    if not isinstance(family, Mapping) or not isinstance(family.get("name"), str) or not family.get("layers"):
        raise ConfigError(f"{family!r} is no family", why="it needs a name and layers")
    name, layers = family["name"], list(family["layers"])
    options = {
        f"{layer_info(mixer).names[0]}_{o}": (layer_info(mixer).names[0], o) for mixer in layers for o in _options(mixer)
    }
    given = {**MODEL, **(sweep.get("model") or {}), **(sweep.get("training") or {})}
    given |= {key: value for key, value in family.items() if key not in ("name", "layers")}
    for key in given:
        if key not in _MODEL_FIELDS | _TRAINING_FIELDS | set(options):
            known = sorted(_MODEL_FIELDS | _TRAINING_FIELDS | set(options))
            raise ConfigError(f"family '{name}': unknown '{key}'", hint=nearest(key, known))
    grid = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    varied = [key for key, values in grid.items() if len(values) > 1]
    order = sorted(grid, key=lambda key: (key == "learning_rate", key not in varied))  # the rate turns fastest
    for values in itertools.product(*(grid[key] for key in order)):
        chosen = dict(zip(order, values, strict=True))
        tags = {key: chosen[key] for key in given if key in varied or key in family}
        yield _point(name, layers, data, chosen, options, tags)


def _options(mixer: str) -> list[str]:
    return list(layer_info(mixer).options)


def _point(
    name: str,
    layers: list[str],
    data: Mapping[str, Any],
    chosen: Mapping[str, Any],
    options: Mapping[str, tuple[str, str]],
    tags: Mapping[str, Any],
) -> Point:
    model = {key: value for key, value in chosen.items() if key in _MODEL_FIELDS}
    training = {key: value for key, value in chosen.items() if key in _TRAINING_FIELDS}
    for key, where in (("hidden_size", model), ("learning_rate", training)):
        if key not in where:
            raise ConfigError(f"family '{name}' has no {key}")
    mixers: dict[str, dict[str, Any]] = {}
    for key, (mixer, option) in options.items():
        if key in chosen:
            mixers.setdefault(mixer, {})[option] = chosen[key]
    model |= {"num_layers": len(layers), "layer_types": layers, "layer_options": mixers}
    model.setdefault("mlp_width", 2 * model["hidden_size"])
    point = Point(name, data, model, training, tags)
    try:
        param_specs(point.config())
    except ConfigError as error:
        raise ConfigError(error.what, where=f"family '{name}' {dict(tags)}", why=error.why, hint=error.hint) from None
    return point


def group(point: Point) -> str:
    """What all learning rates of one model share."""
    training = {key: value for key, value in point.training.items() if key != "learning_rate"}
    return Point(point.name, point.data, point.model, training).key()


def solved(points: Sequence[Point], results: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Groups with a rate whose accuracy reached its `early_stop`."""
    stop = {p.key(): (group(p), Training(**p.training).early_stop) for p in points}
    return {stop[key][0] for key, line in results.items() if key in stop and line["accuracy"] >= stop[key][1]}


def work(points: Sequence[Point], results: Results, say: Callable[[str], None], alive: Callable[[], bool]) -> int:
    """Run what is neither finished nor claimed nor solved by another rate, in order; the number of points run here.

    Args:
        alive: asked before each point; False ends the work.
    """
    done = 0
    for number, point in enumerate(points, 1):
        if not alive():
            break
        with results.claim(point.key()) as mine:
            if not mine:
                continue
            known = results.read()
            if point.key() in known or group(point) in solved(points, known):
                continue
            line = run_point(point)
            results.add(line)
            done += 1
            say(f"[{number}/{len(points)}] {describe(point)}: accuracy {line['accuracy']:.3f} in {line['seconds']:.0f} s")
    return done


def describe(point: Point) -> str:
    """Family and what was varied."""
    return " ".join([point.name, *(f"{key}={value}" for key, value in point.tags.items())])
