"""Accuracy of a checkpoint on the test slices of its synthetic task, also at lengths beyond the trained one.

Every example of a slice is read once, as in the final test of a training run with the same seed. Three numbers per slice: the
share of right answers; the share of examples whose last answer is right, the hardest one where every position asks; and what a
constant answer would reach, the share of the most frequent answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import ConfigError, DataError
from megatron.evaluation.report import token_ticks
from megatron.layers.base import Context
from megatron.model.lm import LanguageModel, embed, run_blocks
from megatron.observe.figure import new_figure, save_figure
from megatron.synthetics.dataset import ExampleStore, Slice, SyntheticDataset, read_slices, task_kind
from megatron.synthetics.task import Examples, Mask

TOKENS_PER_BATCH = 8192


def evaluated_slices(
    spec: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
) -> list[Slice]:
    """The test slices of a specification.

    Args:
        spec: `synthetic` of a configuration.
        tokenizer: of tasks that are made of words.
        lengths: each slice at each of these lengths instead of its own.
        limit: at most so many examples per slice.

    Raises:
        ConfigError: there is no synthetic task, or lengths are given and its slices have none.
    """
    if spec is None:
        raise ConfigError("there is no synthetic task to evaluate", hint="set synthetic, see docs/synthetics.md")
    kind = task_kind(spec.get("task"))
    if lengths:
        if "length" not in {f.name for f in fields(kind)}:
            raise ConfigError(f"{kind.name} has no lengths", hint="leave eval_lengths out")
        entries = spec.get("test") or spec.get("valid") or ()
        without = [{k: v for k, v in e.items() if k != "length"} for e in entries if isinstance(e, Mapping)]
        unique = [entry for number, entry in enumerate(without) if entry not in without[:number]]
        spec = {**spec, "test": [{**entry, "length": length} for length in lengths for entry in unique]}
    slices = read_slices(spec, "test", tokenizer)
    return slices if limit is None else [Slice(part.task, min(part.examples, limit)) for part in slices]


def _right(model: LanguageModel, examples: Examples, backend: str) -> tuple[Mask, Mask]:
    """Where the model is right, and where an answer is expected, both [n, s]."""
    device = next(model.parameters()).device
    answer_mask = examples.labels >= 0
    places = torch.from_numpy(answer_mask).to(device)
    ctx, inner = Context(backend=backend), model.model
    x, _ = embed(inner.embed_tokens, inner.embed_tokens(torch.from_numpy(examples.inputs).to(device)), ctx, None)
    x, _ = run_blocks(inner.layers, x, ctx, None)
    logits = model.lm_head(inner.final_norm(x[places]))
    right = np.zeros(answer_mask.shape, dtype=bool)
    right[answer_mask] = logits.argmax(-1).cpu().numpy() == examples.labels[answer_mask]
    return right, answer_mask


def _measure(model: LanguageModel, store: ExampleStore, backend: str) -> dict[str, Any]:
    """The numbers of one slice."""
    started, size = time.monotonic(), max(1, TOKENS_PER_BATCH // store.task.seq_length)
    right = answers = last = 0
    counts = np.zeros(store.task.rows, dtype=np.int64)
    for start in range(0, len(store), size):
        examples = store.rows(np.arange(start, min(start + size, len(store))))
        correct, answer_mask = _right(model, examples, backend)
        right, answers = right + int(correct.sum()), answers + int(answer_mask.sum())
        ends = answer_mask.shape[1] - 1 - answer_mask[:, ::-1].argmax(1)
        last += int(correct[np.arange(len(ends)), ends].sum())
        counts += np.bincount(examples.labels[answer_mask], minlength=len(counts))
    return {
        "examples": len(store),
        "answers": answers,
        "accuracy": right / answers,
        "last_accuracy": last / len(store),
        "constant_answer": int(counts.max()) / answers,
        "seconds": round(time.monotonic() - started, 2),
    }


@torch.inference_mode()
def measure_slices(model: LanguageModel, slices: Sequence[Slice], seed: int, backend: str = "auto") -> list[dict[str, Any]]:
    """One row per slice: its parameters and numbers, or an `error` if it is too long for the model.

    Args:
        model: the model, in evaluation mode.
        slices: of the test split.
        seed: of the training run.
        backend: see `Context`.

    Raises:
        DataError: the task has more ids than the model.
    """
    rows = max(part.task.rows for part in slices)
    if rows > model.config.vocab_size:
        raise DataError(f"the task has {rows} ids, the model {model.config.vocab_size}", why="it was trained on another task")
    results = []
    for store in SyntheticDataset(slices, seed, "test").stores:
        row: dict[str, Any] = {"parameters": store.task.parameters(), "tokens": store.task.seq_length}
        try:
            results.append({**row, **_measure(model, store, backend)})
        except ValueError as error:  # longer than the learned positions
            results.append({**row, "error": str(error)})
    return results


def slice_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters in which each row differs from others; its tokens if there are none."""
    varied = [key for key, value in rows[0]["parameters"].items() if any(row["parameters"][key] != value for row in rows)]
    return [", ".join(f"{key} {row['parameters'][key]}" for key in varied) or f"{row['tokens']} tokens" for row in rows]


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with aligned columns, accuracies in percent."""
    names = slice_names(rows)
    width = max(map(len, names))
    lines = [f"{'slice':<{width}} {'examples':>9} {'accuracy':>9} {'last':>7} {'constant':>9} {'seconds':>8}"]
    for name, row in zip(names, rows, strict=True):
        if "error" in row:
            lines.append(f"{name:<{width}}  {row['error']}")
            continue
        shares = f"{100 * row['accuracy']:>9.2f} {100 * row['last_accuracy']:>7.2f} {100 * row['constant_answer']:>9.2f}"
        lines.append(f"{name:<{width}} {row['examples']:>9} {shares} {row['seconds']:>8.1f}")
    return "\n".join(lines)


def plot_accuracy(rows: Sequence[Mapping[str, Any]], image: str | Path, title: str, trained: int) -> Path:
    """Plot the accuracies over the tokens of an example; marks the length `trained`.

    Raises:
        DataError: matplotlib is not installed.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    good = sorted((row for row in rows if "error" not in row), key=lambda row: int(row["tokens"]))
    tokens = [row["tokens"] for row in good]
    curves = {"accuracy": ("all answers", "o-"), "last_accuracy": ("last answer", "s-"), "constant_answer": ("constant", ":")}
    for key, (label, style) in curves.items():
        axes.plot(tokens, [row[key] for row in good], style, label=label)
    axes.axvline(trained, color="#969696", linewidth=1, linestyle="--", label="trained length")
    axes.set(ylim=(-0.03, 1.03), xlabel="tokens of an example", ylabel="accuracy", title=title)
    token_ticks(axes, tokens)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.legend(fontsize=8)
    return save_figure(figure, image)
