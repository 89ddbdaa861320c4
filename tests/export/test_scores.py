"""Results of evaluations as rows and metadata of a card: perplexity, lm-eval through eval.py, the stock command; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ExportError
from megatron.export.scores import Score, read_scores

CHECKPOINT = Path("runs/tiny/checkpoints/global_step7")
HARNESS: dict[str, Any] = {
    "task": "lm-eval",
    "checkpoint": "elsewhere/checkpoints/global_step7",
    "lm_eval": "0.4.13",
    "context_length": 1000,
    "prompt_mode": "plain",
    "results": {
        "piqa": {"alias": "piqa", "sample_len": 9, "acc,none": 0.625, "acc_stderr,none": 0.01, "acc_norm,none": 0.5},
        "gsm": {"alias": "gsm", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        "based_fda": {"contains,none": 0.125},
    },
    "n-shot": {"piqa": 0},
    "n-samples": {"piqa": {"original": 1838, "effective": 100}, "gsm": {"original": 10, "effective": 10}},
    "versions": {"piqa": 1.0},
}
PERPLEXITY: dict[str, Any] = {
    "task": "perplexity",
    "checkpoint": str(CHECKPOINT),
    "split": "valid",
    "rows": [
        {"length": 64, "stride": 32, "tokens": 900, "passes": 3, "perplexity": 12.5, "bits_per_byte": 1.25, "seconds": 0.5},
        {"length": 128, "stride": 128, "error": "learned positions end at 64"},
    ],
}


def written(folder: Path, content: Any, name: str = "r.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_harness(tmp_path: Path) -> None:
    scores = read_scores([written(tmp_path, HARNESS)], CHECKPOINT)
    assert [score.row() for score in scores] == [
        ("piqa", "acc", "0.6250", "0.0100", "shots 0, examples 100 of 1838, version 1.0", "eval.py, lm-eval 0.4.13"),
        ("piqa", "acc_norm", "0.5000", "", "shots 0, examples 100 of 1838, version 1.0", "eval.py, lm-eval 0.4.13"),
        ("gsm", "exact_match (strict)", "0.2500", "", "examples 10", "eval.py, lm-eval 0.4.13"),
        ("based_fda", "contains", "0.1250", "", "context 1000, prompts plain", "eval.py, lm-eval 0.4.13"),
    ]
    entry = scores[0].metadata()
    assert (entry.dataset_type, entry.metric_type, entry.metric_value) == ("piqa", "acc", 0.625)
    assert entry.metric_args == {"shots": 0, "examples": "100 of 1838", "version": 1.0}


def test_perplexity(tmp_path: Path) -> None:
    scores = read_scores([written(tmp_path, PERPLEXITY)], CHECKPOINT)
    assert [score.row()[:3] for score in scores] == [
        ("perplexity", "perplexity", "12.5000"),
        ("perplexity", "bits_per_byte", "1.2500"),
    ]
    assert (
        scores[0].row()[4:] == ("length 64, stride 32, tokens 900", "eval.py") and scores[0].metadata().dataset_split == "valid"
    )


def test_the_stock_command_names_no_checkpoint(tmp_path: Path) -> None:
    stock = {"lm_eval_version": "0.4.13", "config": {"model_args": {"pretrained": "hf"}}, "results": {"piqa": {"acc,none": 1}}}
    (score,) = read_scores([written(tmp_path, stock)], CHECKPOINT)
    assert score == Score("piqa", "acc", 1.0, harness="lm-eval 0.4.13")


def test_several_files_keep_their_order(tmp_path: Path) -> None:
    files = [written(tmp_path, PERPLEXITY, "a.json"), written(tmp_path, HARNESS, "b.json")]
    assert [s.task for s in read_scores(files, CHECKPOINT)] == ["perplexity"] * 2 + ["piqa"] * 2 + ["gsm", "based_fda"]
    assert read_scores([], CHECKPOINT) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**HARNESS, "checkpoint": "runs/tiny/checkpoints/global_step9"}, "another checkpoint"),
        ({**HARNESS, "results": {}}, "holds no result"),
        ({**PERPLEXITY, "rows": PERPLEXITY["rows"][1:]}, "holds no result"),
        ({"x": 1}, "not results"),
        ("[1]", "not results"),
        ("{", "not JSON"),
    ],
)
def test_refusals_name_the_file(tmp_path: Path, content: Any, message: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ExportError, match=message) as refused:
        read_scores([file], CHECKPOINT)
    assert str(file) in str(refused.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        read_scores([tmp_path / "none.json"], CHECKPOINT)
