"""A table and a figure from sweeps over classification and state-tracking tasks (`tools/synthetics.py`).

    python tools/figures_sequences.py benchmarks/results/{listops,text,pixels,parity,arithmetic,s5}-cpu.jsonl \\
        --output benchmarks/results/sequences-cpu

Writes `OUTPUT.json`, `OUTPUT.md` (a row per model) and `OUTPUT.png` with a panel per file: bars where a task has one test
slice, else accuracy over length. All accuracies are those after the last step, not the best of a run; beside them stands what a
constant answer reaches, the share of the most frequent one among the answers of the slice, which are drawn again for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron.errors import DataError, exit_on_error
from megatron.files import write_json, write_text
from megatron.synthetics.dataset import ExampleStore, SyntheticDataset, read_slices
from megatron.synthetics.sweep_results import read_lines

Row = Mapping[str, Any]
_MARKS = "os^Dv"


def constant_answer(store: ExampleStore) -> float:
    """Share of the most frequent answer of a slice."""
    labels = store.rows(np.arange(len(store))).labels
    return float(np.bincount(labels[labels >= 0]).max() / (labels >= 0).sum())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A row per model and test slice of one file.

    Raises:
        DataError: there are no results, they are of several tasks, or a run of several slices was measured more than once.
    """
    lines = read_lines(path) if path.is_file() else []
    if not lines:
        raise DataError("there are no results", where=str(path), hint="python tools/synthetics.py SWEEP.yml --output FILE")
    if len({json.dumps(line["data"], sort_keys=True) for line in lines}) != 1:
        raise DataError("results of several tasks cannot be drawn together", where=str(path))
    seed = lines[0]["training"].get("seed", 123)
    stores = SyntheticDataset(read_slices(lines[0]["data"], "test"), seed, "test").stores
    constants = [constant_answer(store) for store in stores]
    rows = []
    for line in lines:
        if len(stores) > 1 and len(line["history"]) > 1:
            raise DataError("slices are known at the best step only", where=str(path), hint="evaluations: 1, epochs: 1")
        for store, part, constant in zip(stores, line["slices"], constants, strict=True):
            rows.append(
                {
                    "task": part.get("group", store.task.name),
                    "tokens": store.task.seq_length,
                    "model": line["name"],
                    "layers": len(line["model"]["layer_types"]),
                    "width": line["model"]["hidden_size"],
                    "parameters": line["parameters"],
                    "recurrent_bytes": sum(sizes.get("recurrent", 0) for sizes in line["state"].values()),
                    "state_bytes": line["state_bytes"],
                    "learning_rate": line["training"]["learning_rate"],
                    "steps": line["steps"],
                    "seeds": 1,
                    "examples": part["examples"],
                    "accuracy": line["final_accuracy"] if len(stores) == 1 else part["accuracy"],
                    "constant_answer": constant,
                    "processor_seconds": line["processor_seconds"],
                    "torch": line["torch"],
                }
            )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table: a row per model, with one accuracy per test slice."""
    head = ["task", "model", "parameters", "recurrent bytes", "state bytes", "steps", "tokens", "accuracy", "constant", "CPU s"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, model in dict.fromkeys((row["task"], row["model"]) for row in rows):
        parts = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        first = parts[0]
        cells = [task, model, f"{first['parameters']:,}", f"{first['recurrent_bytes']:,}", f"{first['state_bytes']:,}"]
        cells += [str(first["steps"]), " / ".join(str(row["tokens"]) for row in parts)]
        cells += [" / ".join(f"{100 * row[key]:.1f}" for row in parts) for key in ("accuracy", "constant_answer")]
        out.append("| " + " | ".join([*cells, f"{first['processor_seconds']:.0f}"]) + " |")
    return "\n".join(out) + "\n"


def draw(groups: Sequence[Sequence[Row]], image: Path, title: str) -> None:
    """A panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(groups))
    count = -(-len(groups) // columns)
    figure, grid = plt.subplots(count, columns, figsize=(1 + 3.6 * columns, 0.6 + 3.2 * count), squeeze=False)
    for axes in grid.ravel()[len(groups) :]:
        axes.axis("off")
    for axes, rows in zip(grid.ravel(), groups, strict=False):
        models = list(dict.fromkeys(row["model"] for row in rows))
        tokens = sorted({row["tokens"] for row in rows})
        for number, model in enumerate(models):
            values = {row["tokens"]: row["accuracy"] for row in rows if row["model"] == model}
            if len(tokens) == 1:
                bar = axes.bar(model, values[tokens[0]], color=f"C{number}")
                axes.bar_label(bar, labels=[f"{100 * values[tokens[0]]:.1f}"], fontsize=8)
            else:
                axes.plot(tokens, [values[n] for n in tokens], marker=_MARKS[number % len(_MARKS)], label=model)
        constants = {row["tokens"]: row["constant_answer"] for row in rows}
        if len(tokens) == 1:
            axes.axhline(constants[tokens[0]], color="black", linestyle=":")
        else:
            axes.plot(tokens, [constants[n] for n in tokens], color="black", linestyle=":", label="constant")
            axes.set_xscale("log", base=2)
            axes.set_xticks(tokens, [str(n) for n in tokens])
            axes.set_xlabel("tokens")
            axes.legend(fontsize=7)
        axes.set_ylim(0, 1.08)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(f"{rows[0]['task']}, {'up to ' if len(tokens) > 1 else ''}{tokens[-1]} tokens", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(image, dpi=130)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Write the JSON, the table and the figure."""
    groups = [rows_of(path) for path in args.results]
    rows, output = [row for group in groups for row in group], args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_name(output.name + ".json"), {"rows": rows})
    write_text(output.with_name(output.name + ".md"), markdown(rows))
    draw(groups, output.with_name(output.name + ".png"), args.title)
    print(markdown(rows), end="")
    for suffix in (".json", ".md", ".png"):
        print(f"wrote {output}{suffix}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the files")
    parser.add_argument("--title", default="two layers, 64 wide, one seed; dotted: a constant answer")
    with exit_on_error():
        args = parser.parse_args()
        run(args)


if __name__ == "__main__":
    main()
