"""The three ways of writing text, on a model that a stand-in replaces where only the bookkeeping matters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.data.tokenizers import CharLevelTokenizer, build_tokenizer
from megatron.errors import DataError
from megatron.generation import text
from megatron.generation.load import filled_model
from megatron.generation.sample import Sampling
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from tests.data.hf_files import around, write


@pytest.fixture(scope="module")
def writer() -> text.Writer:
    config = ModelConfig(512, 32, 1, 2, 48, ("metala",))
    generator = torch.Generator().manual_seed(3)
    weights = {n: torch.randn(s.shape, generator=generator) * 0.5 for n, s in param_specs(config).items()}
    sampling = Sampling(maximum_tokens=6, temperature=1.0, max_length=24)
    return text.Writer(filled_model(config, weights), CharLevelTokenizer(), sampling, batch_size=2)


def test_prompt_file(writer: text.Writer, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("one\n  two words \nthree\n" + "x" * 22 + "\n", encoding="utf-8")
    output = text.default_output(source)
    assert output.name == "prompts.txt.output.jsonl"
    assert text.write_results(writer.continue_texts(text.read_prompts(source)), output) == 4
    records = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [r["context"] for r in records] == ["one", "two words", "three", "x" * 22]
    for record in records:
        assert set(record) == {"context", "text", "length", "finished", "message", "duration_seconds"}
        assert record["finished"] or record["length"] == (2 if record["message"] else 6)
    assert "room for 2 of 6" in records[3]["message"] or records[3]["finished"]


def test_results_do_not_depend_on_batches(writer: text.Writer) -> None:
    contexts = ["one", "another prompt", "x", "", "last"]
    large = text.Writer(writer.model, writer.tokenizer, writer.sampling, batch_size=8)
    assert [r["text"] for r in writer.continue_texts(contexts)] == [r["text"] for r in large.continue_texts(contexts)]


def test_a_template_does_not_end_prompts(writer: text.Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model reads starts as the template says, and ends with the text; an empty one is the template's start."""
    seen: list[list[int]] = []
    real = text.generate

    def spy(model: object, prompts: list[list[int]], *args: object, **options: object) -> object:
        seen.extend(prompts)
        return real(model, prompts, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(text, "generate", spy)
    plain = build_tokenizer("HFTokenizer", write(tmp_path / "plain.json"))
    contexts, wanted = ["the cat", "x", ""], []
    for before, after in (("<s>", "</s>"), ("", "<|endoftext|>"), ("", "")):
        change = around(before, after) if before or after else None
        tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", change))
        list(text.Writer(writer.model, tokenizer, writer.sampling).continue_texts(contexts))
        wanted += [[270] * bool(before) + plain.tokenize(context) for context in contexts]
    assert seen == wanted and seen[2] == [270] and seen[5] == seen[8] == []


def test_a_prompt_of_another_vocabulary(writer: text.Writer, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["Zz"] = 600
        content["model"]["merges"].append(["Z", "z"])

    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", edit=edit))
    other = text.Writer(writer.model, tokenizer, writer.sampling)
    assert len(list(other.continue_texts(["the cat"]))) == 1
    with pytest.raises(DataError, match="does not know a token of the prompt 'Zz'") as caught:
        list(other.continue_texts(["Zz"]))
    assert caught.value.why == "the tokenizer gives the id 600, the model has rows for 512"


def test_unconditional(writer: text.Writer) -> None:
    made = list(text.unconditional(writer, 5))
    assert len(made) == 5 and all(r["context"] == "" for r in made)
    assert len({r["text"] for r in made}) > 1


def test_prompt_end_may_be_any_text(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("first line\nsecond line###next###\n", encoding="utf-8")
    assert text.read_prompts(tmp_path / "p", "###") == ["first line\nsecond line", "next"]


@pytest.mark.parametrize(
    ("content", "end", "prompts"),
    [
        ("one\n\n \ntwo\n", "\n", ["one", "", "", "two"]),
        ("\none", "\n", ["", "one"]),
        ("one\n\n", "\n", ["one", ""]),
        ("one\n  ", "\n", ["one"]),
        ("one###\n###two###\n", "###", ["one", "", "two"]),
    ],
)
def test_blank_prompts_are_kept(writer: text.Writer, tmp_path: Path, content: str, end: str, prompts: list[str]) -> None:
    """The results stand in the order of the file, one for each prompt that it ends."""
    (tmp_path / "p").write_text(content, encoding="utf-8")
    assert text.read_prompts(tmp_path / "p", end) == prompts
    assert [r["context"] for r in writer.continue_texts(prompts)] == prompts


def test_interactive(writer: text.Writer) -> None:
    screen = io.StringIO()
    count = text.interactive(writer, io.StringIO("hello\n\nworld\nunfinished"), screen)
    assert count == 3 and screen.getvalue().count("Context >>> ") == 5 and screen.getvalue().count(" tokens, ") == 3
    assert screen.getvalue().count("a blank context is not continued") == 1
    several = io.StringIO()
    assert text.interactive(writer, io.StringIO("two\nlines END\nmore END"), several, " END") == 2


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no prompt"), (b"\n \n", "no prompt"), (b"ab\xff\n", "not UTF-8"), (None, "cannot be read")]
)
def test_bad_prompt_files(tmp_path: Path, content: bytes | None, word: str) -> None:
    if content is not None:
        (tmp_path / "p").write_bytes(content)
    with pytest.raises(DataError, match=word):
        text.read_prompts(tmp_path / "p")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        text.write_results(iter([{}]), tmp_path / "nowhere" / "out.jsonl")
