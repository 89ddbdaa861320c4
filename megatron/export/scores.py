"""Converts results of `eval.py` or of the `lm_eval` command to rows and metadata of a model card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from megatron.errors import ExportError
from megatron.files import read_json

_NOT_METRICS = ("alias", "name", "sample_len")
_PERPLEXITY = ("perplexity", "word_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Score:
    """One evaluation result.

    Attributes:
        task: lm-eval's name, or `perplexity`.
        metric: `acc`, `word_perplexity`, ...
        value: the result (rates are in [0, 1]).
        filter: lm-eval's filter, empty for none.
        stderr: standard error of the value.
        split: split of the data, if recorded.
        settings: settings that affect the result (`shots`, `examples`, `length`, ...).
        harness: program that measured it.
    """

    task: str
    metric: str
    value: float
    filter: str = ""
    stderr: float | None = None
    split: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    harness: str = ""

    def row(self) -> tuple[str, ...]:
        """Cells of the card's table: task, metric, value, standard error, settings, program."""
        metric = f"{self.metric} ({self.filter})" if self.filter else self.metric
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            self.task,
            metric,
            _figure(self.value),
            "" if self.stderr is None else _figure(self.stderr),
            settings,
            self.harness,
        )

    def metadata(self) -> EvalResult:
        """The entry of the card's `model-index`."""
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.task,
            dataset_name=self.task,
            dataset_split=self.split,
            metric_type=self.metric,
            metric_name=f"{self.metric} ({self.filter})" if self.filter else self.metric,
            metric_value=self.value,
            metric_args=dict(self.settings) or None,
        )


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def read_scores(files: Iterable[Path], checkpoint: Path) -> tuple[Score, ...]:
    """The results in result files, in order.

    Args:
        files: JSON files that `eval.py` (perplexity and lm-eval tasks) or stock `lm_eval` wrote.
        checkpoint: the `global_step<N>` folder to export; results that name another step are refused.

    Raises:
        ExportError: a file cannot be read, holds no result, or belongs to another checkpoint.
    """
    all_scores: list[Score] = []
    for file in files:
        data = _content(file)
        measured = data.get("checkpoint")
        if measured and Path(str(measured)).name != checkpoint.resolve().name:
            raise ExportError(
                "these results belong to another checkpoint",
                where=str(file),
                why=f"measured: {measured}; exported: {checkpoint}",
                hint="run eval.py on the exported checkpoint (--set iteration=N chooses one)",
            )
        scores = list(_perplexity(data) if data.get("task") == "perplexity" else _harness(data))
        if not scores:
            raise ExportError("the file holds no result", where=str(file), hint="name a file that eval.py wrote")
        all_scores += scores
    return tuple(all_scores)


def _content(file: Path) -> Mapping[str, Any]:
    try:
        data = read_json(file)
    except OSError as error:
        raise ExportError("the results cannot be read", where=str(file), why=error.strerror) from None
    except ValueError as error:
        raise ExportError("the results are not JSON", where=str(file), why=str(error)) from None
    if not isinstance(data, dict) or not isinstance(data.get("rows", data.get("results")), (list, dict)):
        raise ExportError("not results of an evaluation", where=str(file), hint="name a JSON file that eval.py wrote")
    return data


def _perplexity(data: Mapping[str, Any]) -> Iterator[Score]:
    for row in data.get("rows") or ():
        settings = {"length": row["length"], "stride": row["stride"], "tokens": row.get("tokens")}
        for metric in _PERPLEXITY:
            if isinstance(row.get(metric), float):
                yield Score("perplexity", metric, row[metric], split=data.get("split"), settings=settings, harness="eval.py")


def _harness(data: Mapping[str, Any]) -> Iterator[Score]:
    ours, stock = data.get("lm_eval"), data.get("lm_eval_version")
    harness = f"eval.py, lm-eval {ours}" if ours else f"lm-eval {stock}" if stock else "lm-eval"
    for task, values in data["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or metric in _NOT_METRICS:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield Score(
                task=task,
                metric=metric,
                value=float(value),
                filter="" if kind == "none" else kind,
                stderr=error if isinstance(error, float) else None,
                settings=_settings(data, task),
                harness=harness,
            )


def _settings(data: Mapping[str, Any], task: str) -> dict[str, Any]:
    counted = (data.get("n-samples") or {}).get(task) or {}
    effective, original = counted.get("effective"), counted.get("original")
    examples = effective if effective == original or not original else f"{effective} of {original}"
    settings = {"shots": (data.get("n-shot") or {}).get(task), "examples": examples}
    settings["version"] = (data.get("versions") or {}).get(task)
    if task.startswith("based_"):
        settings |= {"context": data.get("context_length"), "prompts": data.get("prompt_mode")}
    return {name: value for name, value in settings.items() if value is not None}
