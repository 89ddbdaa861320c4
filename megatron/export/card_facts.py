"""Sections of the model card that come from the run: corpora, mesh, the course of the loss, limits, citation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron import __version__
from megatron.checkpoint.manifest import Manifest
from megatron.errors import ExportError
from megatron.files import parse_json
from megatron.model.config import ModelConfig

_ROWS = 8
_TRAINING = ("train/lm_loss_mean", "train/lm_loss")
_VALIDATION = "validation/lm_loss"
_PAPERS: Mapping[str, tuple[str, str, str, str, str]] = {
    "metala": (
        "chou2024metala",
        "{MetaLA}: Unified Optimal Linear Approximation to Softmax Attention Map",
        "Chou, Yuhong and Yao, Man and Wang, Kexin and Pan, Yuqi and Zhu, Rui-Jie and Wu, Jibin and Zhong, Yiran and Qiao, Yu"
        " and Xu, Bo and Li, Guoqi",
        "2024",
        "2411.10741",
    ),
    "based": (
        "arora2024simple",
        "Simple linear attention language models balance the recall-throughput tradeoff",
        "Arora, Simran and Eyuboglu, Sabri and Zhang, Michael and Timalsina, Aman and Alberti, Silas and Zinsley, Dylan and"
        " Zou, James and Rudra, Atri and R{\\'e}, Christopher",
        "2024",
        "2402.18668",
    ),
    "jrt": (
        "arora2024just",
        "Just read twice: closing the recall gap for recurrent language models",
        "Arora, Simran and Timalsina, Aman and Singhal, Aaryan and Eyuboglu, Sabri and Zhao, Xinyi and Rao, Ashish and Rudra,"
        " Atri and R{\\'e}, Christopher",
        "2024",
        "2407.05483",
    ),
    "mamba": (
        "gu2023mamba",
        "{Mamba}: Linear-Time Sequence Modeling with Selective State Spaces",
        "Gu, Albert and Dao, Tri",
        "2023",
        "2312.00752",
    ),
    "alibi": (
        "press2022train",
        "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        "Press, Ofir and Smith, Noah A. and Lewis, Mike",
        "2022",
        "2108.12409",
    ),
}
"""Mixer -> key, title, authors, year and arXiv number of its paper."""


@dataclass(frozen=True)
class LossRow:
    """A logged step: losses in nats per token, None where none was logged."""

    step: int
    training: float | None
    validation: float | None


def loss_course(checkpoint: Path, metrics: Path | None, last_step: int) -> tuple[LossRow, ...]:
    """Losses of the run up to its exported step, at most eight rows.

    Args:
        checkpoint: the `global_step<N>` folder.
        metrics: `metrics.jsonl`; None: the file next to the folder of checkpoints, if there is one.
        last_step: the exported step; later rows are left out.

    Raises:
        ExportError: `metrics` is given and cannot be read or has no loss up to that step.
    """
    path = checkpoint.parent.parent / "metrics.jsonl" if metrics is None else metrics
    if metrics is None and not path.is_file():
        return ()
    merged: dict[int, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                row = _row(line)
                if row is not None and row["iteration"] <= last_step:
                    merged.setdefault(row["iteration"], {}).update(row)
    except OSError as error:
        raise ExportError("the metrics cannot be read", where=str(path), why=error.strerror or str(error)) from None
    rows = [LossRow(step, _first(row, _TRAINING), _first(row, (_VALIDATION,))) for step, row in sorted(merged.items())]
    validated = [row for row in rows if row.validation is not None]
    logged = (
        validated if len(validated) > 1 else [row for row in rows if row.training is not None or row.validation is not None]
    )
    if metrics is not None and not logged:
        raise ExportError("the metrics hold no loss", where=str(path), why=f"up to step {last_step:,}")
    count = min(_ROWS, len(logged))
    return tuple(logged[round(i * (len(logged) - 1) / max(1, count - 1))] for i in range(count))


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics; None for a line that was cut when its writer was killed."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("iteration")) is int else None


def _first(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    values = [row[name] for name in names if isinstance(row.get(name), (int, float))]
    return float(values[0]) if values and math.isfinite(values[0]) else None


def loss_table(course: Sequence[LossRow]) -> str:
    """The course of the loss as Markdown."""
    if not course:
        return "No metrics of the run were found at export."

    def cell(value: float | None, perplexity: bool = False) -> str:
        return "" if value is None else f"{math.exp(min(value, 700)):,.2f}" if perplexity else f"{value:.4f}"

    lines = ["| step | training loss | validation loss | validation perplexity |", "|---:|---:|---:|---:|"]
    for row in course:
        cells = (f"{row.step:,}", cell(row.training), cell(row.validation), cell(row.validation, perplexity=True))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nLosses are means of nats per token."


def run_rows(manifest: Manifest) -> dict[str, Any]:
    """Rows of the training table: corpora with sizes and fingerprints, mesh, skipped steps, versions."""
    mesh, state, versions = manifest.mesh, manifest.state, manifest.versions
    identity = ((state.get("data") or {}).get("identity") or {}) if isinstance(state.get("data"), Mapping) else {}
    corpora = [
        f"{corpus['sequences']:,} documents, {corpus['tokens']:,} tokens (sizes' SHA-256 {corpus['sizes_sha256'][:16]})"
        for corpus in identity.get("corpora") or ()
        if {"sequences", "tokens", "sizes_sha256"} <= set(corpus)
    ]
    names = {"pp": "pipeline", "dp": "data", "tp": "tensor", "cp": "context"}
    return {
        "corpus": "; ".join(corpora),
        "mesh": " x ".join(f"{mesh[axis]} {name}" for axis, name in names.items() if axis in mesh),
        "skipped steps": state.get("skipped_iterations"),
        "trained with": f"linear-neox, torch {versions['torch']}" if "torch" in versions else "",
    }


def limits(manifest: Manifest, fixed_state: bool, languages: Sequence[str]) -> str:
    """What the model is not good for, as far as the checkpoint shows it."""
    length = manifest.facts.get("seq_length")
    points = [
        "It is a base model: it continues text. It was not tuned to follow instructions, and nobody audited what it writes.",
        "It repeats what its training text says, false, harmful and personal statements included.",
    ]
    if length:
        points.append(
            f"It was trained on sequences of {length:,} tokens; behaviour beyond is measured only where a result says so."
        )
    if fixed_state:
        points.append("Its state has a fixed size: a long input is not recalled word by word, which softmax attention can.")
    if not languages:
        points.append("The languages of its training text were not stated.")
    return "\n".join(f"* {point}" for point in points)


def citation(config: ModelConfig) -> str:
    """BibTeX of this software and of the papers of the model's mixers."""
    kinds = list(dict.fromkeys(config.layer_types))
    kinds += ["alibi"] if any(options.get("positions") == "alibi" for options in config.layer_options.values()) else []
    entries = [
        f"@software{{linear_neox,\n  title = {{linear-neox}},\n  author = {{{{The linear-neox maintainers}}}},\n"
        f"  version = {{{__version__}}},\n  year = {{2026}}\n}}"
    ]
    for kind in dict.fromkeys(kinds):
        if kind in _PAPERS:
            key, title, authors, year, number = _PAPERS[kind]
            entries.append(
                f"@article{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  journal = {{arXiv:{number}}},\n"
                f"  year = {{{year}}}\n}}"
            )
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"
