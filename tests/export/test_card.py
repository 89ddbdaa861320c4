"""The model card: metadata that the Hub's own classes read, facts of the checkpoint, what is stated, code that is Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron.checkpoint.manifest import Manifest
from megatron.errors import ExportError
from megatron.export.card import CardInfo, ExportedModel, model_card
from megatron.export.hf import export_checkpoint
from megatron.export.scores import Score
from megatron.interop.tested_versions import PROVED_TRANSFORMERS
from tests.export.conftest import TINY

SCORES = (
    Score("piqa", "acc", 0.625, stderr=0.011, settings={"shots": 0}, harness="eval.py, lm-eval 0.4.13"),
    Score("perplexity", "perplexity", 12.5, split="valid", settings={"length": 64}, harness="eval.py"),
)


def subject(
    *, native: bool = False, tokenizer: bool = True, facts: dict[str, Any] | None = None, **changes: Any
) -> ExportedModel:
    manifest = Manifest(
        iteration=7000,
        save_id="x",
        mesh={},
        model_config={},
        state={"consumed_tokens": 123456},
        engine={},
        facts=facts or {},
        versions={},
        weights={},
        optimizer={},
        files={},
    )
    return ExportedModel("tiny | run", replace(TINY, **changes), 19808, manifest, "float32", ["a note"], tokenizer, native)


def card_of(stated: CardInfo | None = None, **options: Any) -> ModelCard:
    return ModelCard(model_card(subject(**options), stated or CardInfo()))


def test_metadata_of_an_unstated_card() -> None:
    card = card_of()
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linear-neox", "pretraining", "linear-attention", "metala"],
    }
    assert "## License\n\nNot stated." in card.text and "No results were given at export." in card.text
    assert "| tokens | 123,456 |" in card.text and "step 7,000" in card.text and "# tiny \\| run" in card.text
    assert "* a note" in card.text and "{" not in card.text.split("## Versions")[1].split("## Citation")[0]


def test_everything_stated() -> None:
    facts = {"data": ["hf:allenai/c4?split=train&name=en", "hf:../nowhere", "data/local_text_document"], "run": {"seed": 3}}
    stated = CardInfo("apache-2.0", languages=("en", "code"), datasets=("ada/books", "allenai/c4"), scores=SCORES)
    stated.check()
    card = card_of(stated, facts=facts)
    data = card.data
    assert data.license == "apache-2.0" and data.language == ["en", "code"] and data.datasets == ["allenai/c4", "ada/books"]
    assert data.model_name == "tiny | run" and data.eval_results is not None
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("piqa", "acc", 0.625),
        ("perplexity", "perplexity", 12.5),
    ]
    assert "| piqa | acc | 0.6250 | 0.0110 | shots 0 | eval.py, lm-eval 0.4.13 |" in card.text
    assert "| data | hf:allenai/c4?split=train&name=en, hf:../nowhere, data/local_text_document |" in card.text
    assert "## License\n\n`apache-2.0`" in card.text


def test_what_is_not_finite_stands_in_the_table_only() -> None:
    card = card_of(CardInfo(scores=(Score("perplexity", "perplexity", float("inf")),)))
    assert "| perplexity | perplexity | inf |" in card.text and "model-index" not in card.data.to_dict()


def test_a_license_that_the_hub_does_not_list() -> None:
    stated = CardInfo("other", "our terms", "https://example.org/terms")
    stated.check()
    card = card_of(stated)
    assert (card.data.license, card.data.license_name) == ("other", "our terms")
    assert "[our terms](https://example.org/terms)" in card.text


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (CardInfo("Apache 2.0"), "not a license identifier"),
        (CardInfo("other"), "license is incomplete"),
        (CardInfo("mit", "name"), "license is incomplete"),
        (CardInfo(license_link="https://x"), "license is incomplete"),
        (CardInfo(languages=("English",)), "not a language code"),
        (CardInfo(datasets=("a b",)), "not the name of a dataset"),
        (CardInfo(datasets=("tests/export",)), "not the name of a dataset"),
    ],
)
def test_what_the_hub_would_refuse(stated: CardInfo, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(ExportError, match=message):
        stated.check()


@pytest.mark.parametrize(
    ("kinds", "sentence", "tags"),
    [
        (("metala", "jrt"), "A language model with a recurrent state of fixed size", ["linear-attention", "metala", "jrt"]),
        (("mamba", "base_conv"), "A language model with a recurrent state of fixed size", ["mamba", "base-conv"]),
        (("alibi", "global"), "A language model with softmax attention", ["alibi", "global"]),
        (("based", "alibi"), "A hybrid language model: 1 of its 2 layers keep", ["linear-attention", "based", "alibi"]),
    ],
)
def test_the_kind_of_model(kinds: tuple[str, ...], sentence: str, tags: list[str]) -> None:
    card = card_of(layer_types=kinds)
    assert f"\n{sentence}" in card.text and card.data.tags == ["linear-neox", "pretraining", *tags]


def test_sections_by_folder() -> None:
    own, native = card_of().text, card_of(native=True).text
    range_said = f"`transformers` {PROVED_TRANSFORMERS[0]} to {PROVED_TRANSFORMERS[1]}"
    assert range_said in own and range_said in native
    for word in ("trust_remote_code=True", "### Packing", "### Label smoothing", "says so in one line"):
        assert word in own and word not in native
    for section in ("## Use", "### Batches", "### Fine-tuning", "## Model", "## Training", "## Evaluation", "## Export"):
        assert section in own and section in native
    bare = card_of(tokenizer=False).text
    assert "AutoTokenizer" in own and "okenizer" not in bare.split("## Versions")[0]


def test_code_blocks_are_python() -> None:
    for text in (card_of().text, card_of(native=True).text, card_of(tokenizer=False).text):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) >= 2
        for block in blocks:
            compile(block, "card", "exec")


@pytest.mark.parametrize(("changes", "said"), [({}, False), ({"layer_types": ("jrt", "jrt")}, True)])
def test_a_prefix_is_explained(
    make_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], said: bool
) -> None:
    options = {"layer_options": {"jrt": {"feature_width": 4, "prefix_length": 24}}} if said else {}
    folder = export_checkpoint(make_checkpoint(**changes, **options), tmp_path / "hf").folder
    card = (folder / "README.md").read_text()
    assert ("### The prefix" in card) == said and ("the first 24 tokens" in card) == said
