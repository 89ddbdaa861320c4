"""The closing words of `make train`: how far the loss fell, a sample, and where everything lies.

Draws loss.png where that is missing or older than the metrics: a run that was told to leave does not wait for its plot.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import UserError, exit_on_error
from megatron.files import parse_json, read_text
from megatron.observe.jsonl import read_rows
from megatron.observe.plot import plot_metrics, series


def draw(run: Path, metrics: Path) -> None:
    """Make loss.png again unless it shows all of the metrics; what stands against it is said."""
    plot = run / "loss.png"
    if plot.is_file() and plot.stat().st_mtime >= metrics.stat().st_mtime:
        return
    try:
        plot_metrics(metrics, plot, run.resolve().name)
    except UserError as error:
        print(error.what, file=sys.stderr)


def first_sample(file: Path) -> str | None:
    """Prompt and text of the first sample, None where there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):
        sample = parse_json(read_text(file).splitlines()[0])
        return str(sample["context"] + sample["text"])
    return None


def summary(run: Path) -> str:
    """The text; a folder without metrics is a UserError."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError("there is no run here", where=str(metrics), why="no such file", hint="name a run folder, or make train")
    draw(run, metrics)
    losses = list(zip(*series(read_rows(metrics), "validation/lm_loss"), strict=True))
    lines = ["", "-" * 78]
    if losses:
        (_, first), (step, last) = losses[0], losses[-1]
        lines.append(f"validation loss   {first:.3f} -> {last:.3f} after {step} steps ({last / first:.1%} of its first value)")
    samples = run / "samples.jsonl"
    if (sample := first_sample(samples)) is not None:
        lines.append("a sample          " + sample.replace("\n", "\n                  "))
    places = {
        "plot": run / "loss.png",
        "metrics": metrics,
        "checkpoints": run / "checkpoints",
        "HF folder": run / "hf",
        "samples": samples,
        "config": run / "config.yml",
    }
    lines += [f"{name:17} {path}" for name, path in places.items() if path.exists()]
    if (run / "hf").exists():
        lines.append(f'use it            AutoModelForCausalLM.from_pretrained("{run / "hf"}", trust_remote_code=True)')
    return "\n".join(lines)


def main() -> None:
    """Print the summary of one run folder."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder, such as runs/metala-quickstart")
    with exit_on_error():
        arguments = parser.parse_args()
        print(summary(arguments.run))


if __name__ == "__main__":
    main()
