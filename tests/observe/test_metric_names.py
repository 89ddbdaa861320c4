"""Every metric, console field, console line and file of a run folder has an entry with its meaning, and none has two names."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.model.objectives import Objective
from megatron.observe.console import FIELDS, Console
from megatron.observe.jsonl import JsonLines, read_rows
from megatron.observe.metrics import METRICS, CostModel
from megatron.observe.runfolder import FILES, RunFolder
from megatron.observe.sinks import Sinks
from megatron.training.evaluate import Evaluation
from megatron.training.hooks import Skip, Step
from megatron.training.reporting import LINES, Reporting

ROOT = Path(__file__).resolve().parents[2]
PREFIX = re.compile(r"(train|runtime|validation|test)/\w+$")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and lines of a run that has everything: JRT's parts, a loss scale, both utilisations, saves, evaluations, a skip."""
    folder, screen = tmp_path_factory.mktemp("run"), io.StringIO()
    engine = SimpleNamespace(
        loss_parts=dict.fromkeys(Objective("jrt", prefix_length=2).parts, 1.0),
        extra_state=lambda: {"loss_scale": {"value": 65536.0}},
    )
    state = SimpleNamespace(
        consumed_tokens=64, consumed_samples=4, skipped_iterations=1, iteration=2, best_iteration=2, applied_iterations=1
    )
    options = SimpleNamespace(samples_per_step=2, seq_length=16, train_iters=2)
    run: Any = SimpleNamespace(engine=engine, state=state, options=options)
    sinks = Sinks({"metrics.jsonl": JsonLines(folder / "metrics.jsonl")})
    hook = Reporting(sinks, Console(screen), CostModel(1e6, peak_tflops=1.0, recompute=True), log_interval=1)
    hook.on_step(run, Step(1, float("nan"), 1.0, 1e-3, True, 0.1, 0.0, (0, 1)))
    hook.on_skip(run, Skip(1, "the loss is nan", [(0, 1)]))
    hook.on_rewind(run, 0)
    hook.on_save(run, folder / "global_step1", 0.5)
    hook.on_step(run, Step(2, 3.0, 1.0, 1e-3, False, 0.1, 0.0, (2, 3)))
    for split in ("validation", "test"):
        hook.on_evaluation(run, Evaluation(split, 3.0, 1, 0.1, accuracy=0.5))
    hook.on_end(run, "finished")
    return read_rows(folder / "metrics.jsonl"), [line.split("] ", 1)[1] for line in screen.getvalue().splitlines()]


def test_every_key_has_a_meaning_and_every_meaning_a_key(reported: tuple[list[dict[str, Any]], list[str]]) -> None:
    assert {key for row in reported[0] for key in row} == set(METRICS)
    assert all(metric.meaning.endswith(".") for metric in METRICS.values())


def test_no_other_file_names_a_metric_without_a_meaning() -> None:
    """Also those that the run above does not write: every constant of the form train/... in the code."""
    for path in sorted((ROOT / "megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and PREFIX.match(node.value):
                assert node.value in METRICS, f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"


def test_fields_of_the_progress_line(reported: tuple[list[dict[str, Any]], list[str]]) -> None:
    full = [line for line in reported[1] if line.startswith(" samples/sec")][-1]
    labels = [re.sub(r"(: | +\d+/ ).*", "", field.strip()) for field in full.strip(" |").split(" | ")]
    assert labels == list(FIELDS)


def _pattern(line: str) -> str:
    """A regular expression of an entry of `LINES`: words in capitals are values, accuracy and the last note are optional."""
    text = re.sub(r"\b[A-Z]+\b", ".+", re.escape(line).replace(r"\ ", " "))
    return text.replace("accuracy", "(accuracy").replace(r"\| .+ s \(best so far\)", r"\| )?.+ s( \(best so far\))?")


def test_other_lines_of_the_console(reported: tuple[list[dict[str, Any]], list[str]]) -> None:
    others = [line for line in reported[1] if not line.startswith(" samples/sec")]
    unseen = dict.fromkeys(LINES)
    for line in others:
        entries = [entry for entry in LINES if re.fullmatch(_pattern(entry), line)]
        assert entries, line
        unseen.pop(entries[0], None)
    assert not unseen


def test_paths_of_the_run_folder_are_in_the_table() -> None:
    folder, files = RunFolder(Path()), _first_parts(FILES)
    for path in (folder.config, folder.command, folder.metrics, folder.plot, folder.logs):
        assert path.as_posix() in files, path


def _first_parts(files: Mapping[str, str]) -> set[str]:
    return {name.split("/")[0] for name in files}
