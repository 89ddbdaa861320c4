"""The card's sections from a run: the course of its loss, corpora and mesh, limits, BibTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron import __version__
from megatron.checkpoint.manifest import Manifest
from megatron.errors import ExportError
from megatron.export.card import CardInfo
from megatron.export.card_facts import LossRow, citation, limits, loss_course, loss_table, run_rows
from megatron.export.hf import export_checkpoint
from tests.export.conftest import TINY
from tests.export.test_card import subject


def manifest(**fields: Any) -> Manifest:
    return replace(subject().manifest, **fields)


def write_metrics(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def checkpoint(folder: Path) -> Path:
    path = folder / "checkpoints" / "global_step40"
    path.mkdir(parents=True)
    return path


def test_the_course_is_that_of_the_run_up_to_its_step(tmp_path: Path) -> None:
    path, rows = checkpoint(tmp_path), [{"iteration": 0, "validation/lm_loss": 8.0}]
    rows += [{"iteration": step, "train/lm_loss": 9.0, "train/lm_loss_mean": 8.0 - step / 10} for step in range(1, 61)]
    rows += [{"iteration": step, "validation/lm_loss": 7.0 - step / 10} for step in range(2, 61, 2)]
    write_metrics(tmp_path / "metrics.jsonl", *rows, '{"iteration": 39, "validation/lm_lo', "[1]", {"iteration": "x"})
    course = loss_course(path, None, 40)
    assert len(course) == 8 and course[0] == LossRow(0, None, 8.0) and course[-1] == LossRow(40, 4.0, 3.0)
    assert [row.step for row in course] == sorted({row.step for row in course})
    table = loss_table(course)
    assert "| 40 | 4.0000 | 3.0000 | 20.09 |" in table and "| 0 |  | 8.0000 | 2,980.96 |" in table


def test_training_losses_where_nothing_was_validated(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    given = write_metrics(tmp_path / "other.jsonl", *({"iteration": i, "train/lm_loss": float(i)} for i in (10, 20, 30)))
    assert loss_course(path, None, 40) == () and "No metrics of the run" in loss_table(())
    assert [row.training for row in loss_course(path, given, 25)] == [10.0, 20.0]
    assert loss_course(
        path, write_metrics(given, {"iteration": 1, "train/lm_loss": float("nan")}, {"iteration": 2, "train/lm_loss": 1}), 9
    ) == (LossRow(2, 1.0, None),)


def test_metrics_that_are_named_must_be_there(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    with pytest.raises(ExportError, match="cannot be read"):
        loss_course(path, tmp_path / "no.jsonl", 40)
    with pytest.raises(ExportError, match="hold no loss"):
        loss_course(path, write_metrics(tmp_path / "late.jsonl", {"iteration": 50, "train/lm_loss": 1.0}), 40)


def test_corpora_and_mesh() -> None:
    corpus = {"sequences": 731, "tokens": 3481688, "sizes_sha256": "dd3dcfd258b6924af0296ec9c7743a41"}
    state = {"data": {"identity": {"corpora": [corpus]}}, "skipped_iterations": 2}
    rows = run_rows(manifest(state=state, mesh={"pp": 2, "dp": 4, "tp": 1}, versions={"torch": "2.13.0"}))
    assert rows == {
        "corpus": "731 documents, 3,481,688 tokens (sizes' SHA-256 dd3dcfd258b6924a)",
        "mesh": "2 pipeline x 4 data x 1 tensor",
        "skipped steps": 2,
        "trained with": "linear-neox, torch 2.13.0",
    }
    assert set(run_rows(manifest(state={"data": [1, 2]})).values()) == {"", None}  # a stream's cursor, or an import


def test_limits_are_those_of_the_model() -> None:
    told = limits(manifest(facts={"seq_length": 2048}), True, ())
    assert "2,048 tokens" in told and "fixed size" in told and "languages" in told
    assert not re.search("fixed size|languages|sequences of", limits(manifest(facts={}), False, ("en",)))


@pytest.mark.parametrize(
    ("changes", "papers"),
    [
        ({}, {"2411.10741"}),
        ({"layer_types": ("based", "jrt")}, {"2402.18668", "2407.05483"}),
        (
            {"layer_types": ("global", "mamba"), "layer_options": {"global": {"positions": "alibi"}}},
            {"2312.00752", "2108.12409"},
        ),
        ({"layer_types": ("sliding", "global")}, set()),
    ],
)
def test_citations_name_the_papers_of_the_mixers(changes: dict[str, Any], papers: set[str]) -> None:
    text = citation(replace(TINY, **changes))
    assert set(re.findall(r"arXiv:([\d.]+)", text)) == papers and f"version = {{{__version__}}}" in text
    assert text.count("{") == text.count("}") and text.startswith("```bibtex\n@software")


def test_an_export_reads_the_metrics_of_its_run(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = make_checkpoint()
    step = int(path.name.removeprefix("global_step"))
    write_metrics(tmp_path / "m.jsonl", *({"iteration": i, "validation/lm_loss": 2.0 + i} for i in range(step + 3)))
    folder = export_checkpoint(
        path, tmp_path / "hf", stated=CardInfo("mit", languages=("en",), metrics=tmp_path / "m.jsonl")
    ).folder
    card = ModelCard.load(folder / "README.md")
    assert f"| {step} |  | {2 + step:.4f} |" in card.text and f"| {step + 1} |" not in card.text
    headings = re.findall(r"^##+ (.+)$", card.text, re.M)
    order = ["Model", "Training", "Loss", "Evaluation", "Limits", "License", "Citation", "Export"]
    assert [heading for heading in headings if heading in order] == order
    assert card.data.license == "mit" and "languages of its training text" not in card.text
