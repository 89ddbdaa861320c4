"""Chunked reading equals one pass for every mixer; loss by position equals a direct computation; the words of `eval.py`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.tokenizers import CharLevelTokenizer
from megatron.errors import ConfigError, DataError
from megatron.evaluation.chunked import ChunkedPrompts, chunk_length, token_losses
from megatron.evaluation.documents import run_documents, text_documents
from megatron.evaluation.long_documents import default_lengths, measure, position_losses, select, table
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from tests.commands import run_here
from tests.evaluation.corpus import write_corpus
from tests.evaluation.tiny import tiny_config, trained_checkpoint

MIXERS = [("metala", "metala"), ("based", "base_conv"), ("mamba", "sliding"), ("alibi", "global"), ("jrt", "metala")]
ROWS = 40


def model(types: tuple[str, ...], **changes: object) -> LanguageModel:
    options = {"jrt": {"prefix_length": 7}} if "jrt" in types else {}
    config = ModelConfig(ROWS, 32, len(types), 2, 48, types, layer_options=options, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    built = build_model(config).double().eval()
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 1.0))
    return built


def ids(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, ROWS, shape))


@pytest.mark.parametrize("types", MIXERS, ids="-".join)
def test_chunks_give_what_one_pass_gives(types: tuple[str, ...]) -> None:
    built, prompts, answers = model(types), ids(2, 61), ids(2, 5)
    whole = ChunkedPrompts(built, prompts, chunk=1000)
    for chunk in (61, 16, 7, 1):
        parts = ChunkedPrompts(built, prompts, chunk=chunk)
        torch.testing.assert_close(parts.prefill(), whole.prefill(), rtol=1e-9, atol=1e-9)
        for a, b in zip(parts.score(answers), whole.score(answers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert parts.advance(answers[:, 0]).shape == (2, ROWS)
    if "jrt" not in types:  # a prompt's prefix is not that of a longer text
        logits, _ = built(torch.cat([prompts, answers], 1))
        scores = logits.log_softmax(-1)[:, 60:-1].gather(-1, answers[..., None])[..., 0]
        torch.testing.assert_close(whole.score(answers)[0], scores, rtol=1e-9, atol=1e-9)


def test_scoring_leaves_the_state_alone_and_generation_goes_on_from_the_prompt() -> None:
    built, prompts = model(("metala", "alibi")), ids(1, 30)
    reader = ChunkedPrompts(built, prompts, vocab_size=20, chunk=8)
    first = reader.score(ids(1, 4) % 20)[0]
    assert torch.equal(first, reader.score(ids(1, 4) % 20)[0]) and reader.prefill().shape == (1, 20)
    logits, _ = built(torch.cat([prompts, torch.tensor([[3]])], 1))
    torch.testing.assert_close(reader.advance(torch.tensor([3])), logits[:, -1, :20], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("types", MIXERS, ids="-".join)
def test_loss_by_position_equals_a_direct_computation(types: tuple[str, ...]) -> None:
    built, documents = model(types), select(iter([*ids(3, 50).numpy(), ids(20).numpy()]), 48, "here")
    assert documents.count == 4 and documents.excluded == 1
    causal = model(types)
    causal.load_state_dict(built.state_dict())
    for block in causal.model.blocks():
        if hasattr(block.token_mixer, "prefix_length"):
            block.token_mixer.prefix_length = 0  # a prefix would see the labels
    inputs = np.concatenate([np.full((3, 1), 5), documents.tokens[:, :-1]], 1)
    with torch.no_grad():
        logits, _ = causal(torch.from_numpy(inputs))
    logp = logits[..., :ROWS].log_softmax(-1).gather(-1, torch.from_numpy(documents.tokens)[..., None])[..., 0]
    for chunk in (None, 9):
        losses = position_losses(built, documents, 5, vocab_size=ROWS, chunk=chunk, tokens_per_batch=96)
        torch.testing.assert_close(losses, -logp.mean(0), rtol=1e-9, atol=1e-9)
    result = measure(built, documents, [10, 48], 5, vocab_size=ROWS)
    assert result["documents"] == 3 and result["excluded_documents"] == 1 and result["tokens"] == 3 * 48
    first, second = result["rows"]
    assert (first["from"], first["length"], second["from"], second["length"]) == (0, 10, 10, 48)
    assert first["loss"] == pytest.approx(-float(logp[:, :10].mean())) == first["loss_up_to"]
    assert second["loss"] == pytest.approx(-float(logp[:, 10:].mean()))
    assert second["perplexity_up_to"] == pytest.approx(math.exp(-float(logp.mean())))
    assert "10..47" in table(result) and "1 shorter ones excluded" in table(result)


def test_padding_rows_of_the_vocabulary_get_no_probability() -> None:
    built, tokens = model(("metala",)), ids(1, 12) % 20
    few = token_losses(built, tokens, tokens, vocab_size=20)
    with torch.no_grad():
        built.lm_head.weight[20:] = 100.0
    assert torch.equal(token_losses(built, tokens, tokens, vocab_size=20), few)
    documents = select(iter([np.asarray([1, 2, 30])]), 3, "here")
    with pytest.raises(DataError, match="outside the tokenizer's 20 ids"):
        position_losses(built, documents, 0, vocab_size=20)


def test_lengths_and_chunks() -> None:
    assert default_lengths(128) == (32, 64, 128, 256, 512, 1024, 2048)
    assert chunk_length(1, 100) == 2048 and chunk_length(1, 65536) == 512 and chunk_length(64, 1 << 20) == 32


def test_documents(tmp_path: Path) -> None:
    tokenizer = CharLevelTokenizer()
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two!"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"words": 3}\n')
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5], [6], [7, 8]])
    assert [len(d) for d in text_documents(tmp_path / "a.txt", tokenizer)] == [8]
    assert [len(d) for d in text_documents(tmp_path / "a.jsonl", tokenizer)] == [3, 4]
    with pytest.raises(DataError, match="no text"):
        list(text_documents(tmp_path / "bad.jsonl", tokenizer))
    with pytest.raises(DataError, match="cannot be read"):
        list(text_documents(tmp_path / "none.txt", tokenizer))
    documents, where = run_documents(None, prefix, "50,25,25", "train", None, tokenizer)
    assert [d.tolist() for d in documents] == [[1, 2, 3], [4, 5]] and prefix in where
    documents, _ = run_documents(None, None, "1", "valid", [prefix, prefix], tokenizer)
    assert len(list(documents)) == 8
    with pytest.raises(DataError, match="no text to read"):
        run_documents(None, None, "1", "valid", None, tokenizer)


def test_select_counts_and_stops_at_the_limit() -> None:
    documents = [np.arange(n) for n in (3, 9, 2, 9, 9)]
    chosen = select(iter(documents), 5, "here", limit=2)
    assert chosen.tokens.tolist() == [[0, 1, 2, 3, 4]] * 2 and chosen.count == 4 and chosen.excluded == 2
    with pytest.raises(DataError, match="no document has 10 tokens"):
        select(iter(documents), 10, "here")
    with pytest.raises(ConfigError, match="cannot read documents"):
        position_losses(model(("global",), learned_positions=8), select(iter(documents), 9, "here"), 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with the checkpoint of a tiny model and a corpus with one long document."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = trained_checkpoint(folder / "checkpoints", tiny_config("metala"), steps=2)
    text = b"The dog ate the log. " * 200
    values = {
        "data_path": write_corpus(folder / "c", [[*text[:n], 0] for n in (4000, 100, 4000, 300)]),
        "split": "0,100,0",
        "tokenizer_type": "CharLevelTokenizer",
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 64,
        "load": str(checkpoint.parent),
        "run_dir": str(folder / "run"),
    }
    (folder / "tiny.yml").write_text(json.dumps(values))
    return folder / "tiny.yml"


def test_the_words_of_eval(run: Path) -> None:
    words = ["--eval_tasks", "perplexity_by_length,niah_single_1", "niah_single_2", "--lengths", "400,512", "--limit", 1]
    done = run_here("eval.py", run, *words, "--depths", "0,1")
    assert done.returncode == 0, done.stderr + done.stdout
    results = {json.loads(p.read_text())["task"]: json.loads(p.read_text()) for p in (run.parent / "run").glob("*.json")}
    by_length, needles = results["perplexity_by_length"], results["needles"]
    assert by_length["excluded_documents"] == 0 and [row["length"] for row in by_length["rows"]] == [400, 512]
    assert set(needles["scores"]) == {f"niah_single_{k}@{n}" for k in (1, 2) for n in (400, 512)}
    assert len(needles["rows"]) == 8 and needles["trained_length"] == 64 and "split valid" in needles["haystack"]
    assert "niah_single_1 accuracy" in done.stdout and "400..511" in done.stdout


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["perplexity_by_length", "--lengths", "5000"], "no document has 5,000 tokens", 3),
        (["niah_single_2", "--lengths", "9000"], "the text is too short for a haystack", 3),
        (["niah_single_1", "--lengths", "60"], "does not fit into 60 tokens", 3),
        (["niah_single_1", "--depths", "2"], "eval_depths", 2),
        (["niah_singel_1"], "unknown evaluation task 'niah_singel_1'", 2),
        (["needle"], "needles of a training task", 2),
        (["niah_single_2", "--eval_text", "none.txt"], "the text file cannot be read", 3),
    ],
)
def test_mistakes_of_the_words(run: Path, words: list[str], said: str, code: int) -> None:
    done = run_here("eval.py", run, "--eval_tasks", *words)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
