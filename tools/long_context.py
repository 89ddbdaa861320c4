"""Long-context measures of several models: needles over length and depth, and the loss over the position, as one JSON and PNGs.

    python tools/long_context.py configs/synthetics/needles-sweep.yml --output benchmarks/results/needles-cpu
    python tools/long_context.py SWEEP.yml --models metala=runs/a/checkpoints mamba=runs/b/checkpoints --output runs/long

A sweep names the configuration of all models (`config`), the settings of each (`models`), the folder of their runs (`runs`),
and what is measured: `needles` (`tasks`, `lengths`, `depths`, `examples`) and `by_length` (`lengths`, `documents`). `longest`
limits the needle lengths of single models (attention over 64k tokens takes minutes on a CPU). Models that are not trained yet
are trained by `train.py`; `--models` measures existing checkpoints instead. Published needle scores
(`benchmarks/published/scores.csv`) are drawn below ours, marked as published: other models, other wording, other texts.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import ConfigError, DataError, exit_on_error
from megatron.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "benchmarks" / "published" / "scores.csv"
KEYS = ("config", "runs", "models", "needles", "by_length", "longest")


def read_sweep(path: str) -> dict[str, Any]:
    """The sweep of a YAML file.

    Raises:
        ConfigError: it is unreadable, or a key is unknown or missing.
    """
    import yaml

    try:
        sweep = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("the sweep cannot be read", where=path, why=str(error)) from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("models"), dict) or "config" not in sweep:
        raise ConfigError("the sweep names no models", where=path, hint="config: CONFIG.yml, models: {NAME: [KEY=VALUE]}")
    for key in sweep:
        if key not in KEYS:
            raise ConfigError(f"a sweep has no '{key}'", where=path, hint=f"one of {', '.join(KEYS)}")
    return sweep


def measured(name: str, folder: Path, settings: list[str], sweep: Mapping[str, Any]) -> dict[str, Any]:
    """All measures of one model: parameters, `needles`, `by_length`."""
    import torch

    from megatron.checkpoint.find import find_checkpoint
    from megatron.config.cli import config_from_args, make_parser
    from megatron.evaluation.documents import run_documents
    from megatron.evaluation.ladder import DEPTHS, EXAMPLES, LENGTHS, Plan
    from megatron.evaluation.long_context import measure_by_length, measure_needles
    from megatron.evaluation.long_documents import default_lengths
    from megatron.generation.load import load_model
    from megatron.settings import tokenizer_of

    words = [word for setting in settings for word in ("--set", setting)]
    run = config_from_args(make_parser("").parse_args([sweep["config"], *words]), check=False)
    tokenizer, data = tokenizer_of(run), run.data
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint is not None  # the folder is given
    model, _ = load_model(checkpoint, dtype=torch.float32)
    documents = partial(run_documents, None, data.data_path, data.split, "valid", data.valid_data_paths, tokenizer)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "trained_length": run.model.seq_length}
    print(f"{name}: {checkpoint}", flush=True)
    if part := sweep.get("needles"):
        lengths = [n for n in part.get("lengths", LENGTHS) if n <= (sweep.get("longest") or {}).get(name, n)]
        depths = tuple(float(depth) for depth in part.get("depths", DEPTHS))
        plan = Plan(tuple(lengths), depths, part.get("examples", EXAMPLES), run.training.seed)
        result["needles"] = measure_needles(model, tokenizer, part["tasks"], plan, documents, spec=data.synthetic)
    if part := sweep.get("by_length"):
        ends = part.get("lengths") or default_lengths(run.model.seq_length)
        result["by_length"] = measure_by_length(model, tokenizer, ends, documents, limit=part.get("documents"))
    return result


def published_scores() -> dict[str, dict[int, float]]:
    """`model, kind` -> length -> percent, of all published needle scores."""
    from megatron.evaluation.published_tables import read_published

    scores: dict[str, dict[int, float]] = {}
    for row in (row for rows in read_published(PUBLISHED).values() for row in rows):
        for column, value in row.cells.items():
            task, _, length = column.partition("@")
            if task.startswith("niah_"):
                scores.setdefault(f"{row.name}, {task} ({row.source})", {})[int(length)] = value
    return scores


def draw(models: Mapping[str, Any], output: Path, published: bool) -> list[Path]:
    """The figures of what was measured."""
    from megatron.evaluation.report import plot_ladder, plot_positions

    ladders = {name: model["needles"]["rows"] for name, model in models.items() if "needles" in model}
    curves = {name: model["by_length"]["rows"] for name, model in models.items() if "by_length" in model}
    lengths = {model["trained_length"] for model in models.values()}
    title = f"needles, percent of the values, trained at {'/'.join(map(str, sorted(lengths)))} tokens"
    paths = []
    if ladders:
        scores = published_scores() if published else None
        paths.append(plot_ladder(ladders, output.with_name(f"{output.name}-needles.png"), title, scores))
    if curves:
        place = output.with_name(f"{output.name}-positions.png")
        paths.append(plot_positions(curves, place, "loss over the position in long documents", max(lengths)))
    return paths


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="YAML file")
    parser.add_argument("--models", nargs="+", metavar="NAME[=CHECKPOINTS]", help="only these, trained or in these folders")
    parser.add_argument("--no-published", action="store_true", help="draw no published scores")
    parser.add_argument("--redraw", action="store_true", help="only draw the figures of OUTPUT.json")
    parser.add_argument("--output", type=Path, default=Path("runs/long-context/results"), help="prefix of the files")
    with exit_on_error():
        a = parser.parse_args()
        if a.redraw:
            report_figures(read_json(a.output.with_suffix(".json"))["models"], a)
            return
        import torch

        from megatron.evaluation.published_tables import read_published
        from tools.extrapolation import trained

        sweep, started = read_sweep(a.sweep), time.monotonic()
        runs, models = Path(sweep.get("runs", "runs/long-context")), {}
        for word in a.models or sweep["models"]:
            name, _, folder = word.partition("=")
            settings = [str(setting) for setting in sweep["models"].get(name) or ()]
            if not folder and name not in sweep["models"]:
                raise ConfigError(
                    f"the sweep has no model '{name}'", hint=f"one of {', '.join(sweep['models'])}, or NAME=FOLDER"
                )
            durations = {} if folder else trained(name, sweep["config"], runs, settings)
            place = Path(folder) if folder else runs / name / "checkpoints"
            models[name] = {**durations, **measured(name, place, settings, sweep)}
        facts = {
            "command": f"python tools/long_context.py {' '.join(sys.argv[1:])}",
            "sweep": a.sweep,
            "torch": torch.__version__,
        }
        facts |= {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
        sources = sorted({row.source for rows in read_published(PUBLISHED).values() for row in rows if _has_needles(row.cells)})
        a.output.parent.mkdir(parents=True, exist_ok=True)
        published = {"note": "not measured here", "sources": sources, "scores": published_scores()}
        seconds = {"seconds": round(time.monotonic() - started, 1), "processor_seconds": round(time.process_time(), 1)}
        write_json(a.output.with_suffix(".json"), {**facts, **seconds, "models": models, "published": published})
        print(f"wrote {a.output.with_suffix('.json')}")
        report_figures(models, a)


def report_figures(models: Mapping[str, Any], a: argparse.Namespace) -> None:
    """Draw the figures if matplotlib is installed."""
    try:
        for path in draw(models, a.output, not a.no_published):
            print(f"wrote {path}")
    except DataError as error:
        print(error.what)


def _has_needles(columns: Mapping[str, float]) -> bool:
    return any(column.startswith("niah_") for column in columns)


if __name__ == "__main__":
    main()
