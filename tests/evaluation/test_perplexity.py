"""Every token is scored once, for any length and stride; the context is what the protocol says; numbers by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from megatron.errors import ConfigError, DataError
from megatron.evaluation.perplexity import Window, score, windows
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel

ROWS = 40


def model(*types: str, **changes: object) -> LanguageModel:
    config = ModelConfig(ROWS, 32, len(types), 2, 48, types, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    made = build_model(config).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 1.0))
    return made


def stream(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, ROWS, count).astype(np.uint16)


def test_every_token_is_scored_once_for_any_length_and_stride() -> None:
    draw = random.Random(0)
    cases = [(draw.randint(1, 300), draw.randint(1, 60)) for _ in range(300)]
    for count, length in cases:
        stride = draw.randint(1, length)
        found = list(windows(count, length, stride))
        assert [i for w in found for i in range(w.new, w.stop)] == list(range(count))
        assert len(found) == math.ceil(count / stride)
        for w in found:
            assert 0 <= w.start <= w.new < w.stop and w.stop - w.start <= length
            assert w.new - w.start == min(w.new, length - stride)  # the context grows, then stays


def test_windows_by_hand() -> None:
    assert list(windows(5, 2, 2)) == [Window(0, 0, 2), Window(2, 2, 4), Window(4, 4, 5)]
    assert list(windows(7, 5, 3)) == [Window(0, 0, 3), Window(1, 3, 6), Window(4, 6, 7)]


@pytest.mark.parametrize("types", [("global",), ("alibi",), ("sliding", "metala"), ("metala",)])
@pytest.mark.parametrize(("count", "length", "stride"), [(50, 16, 16), (50, 16, 5), (37, 64, 64), (33, 12, 1)])
def test_equals_scoring_one_token_at_a_time(types: tuple[str, ...], count: int, length: int, stride: int) -> None:
    made, tokens = model(*types), stream(count)
    total = 0.0
    before = np.concatenate([[7], tokens[:-1]]).astype(np.int64)
    for i in range(count):
        new = i // stride * stride
        start = max(0, new - (length - stride))
        with torch.no_grad():
            logits, _ = made(torch.from_numpy(before[start : i + 1])[None])
        total -= float(logits[0, -1].log_softmax(-1)[int(tokens[i])])
    found = score(made, tokens, 7, length, stride)
    assert found.tokens == count and found.passes == math.ceil(count / stride)
    assert found.nll == pytest.approx(total, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(total / count))


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 1000])
def test_batches_change_nothing(tokens_per_batch: int) -> None:
    made, tokens = model("alibi"), stream(101)
    want = score(made, tokens, 0, 20, 6)
    assert score(made, tokens, 0, 20, 6, tokens_per_batch=tokens_per_batch).nll == pytest.approx(want.nll, rel=1e-13)
    assert score(made, tokens, 0, 20).nll == score(made, tokens, 0, 20, 20).nll != want.nll


def test_report_per_word_and_per_byte() -> None:
    found = score(model("metala"), stream(60), 0, 20)
    report = found.report(words=30, size=120)
    assert report["word_perplexity"] == pytest.approx(math.exp(found.nll / 30))
    assert report["bits_per_byte"] == pytest.approx(found.nll / math.log(2) / 120)
    assert report["perplexity"] == pytest.approx(report["word_perplexity"] ** 0.5)
    assert "word_perplexity" not in found.report()


def test_rows_that_pad_the_vocabulary_take_no_probability() -> None:
    made = model("metala")
    tokens = [t % 20 for t in stream(40)]
    found = score(made, tokens, 0, 20, vocab_size=20)
    with torch.no_grad():
        made.lm_head.weight[20:] = 100.0  # whatever they hold
    assert score(made, tokens, 0, 20, vocab_size=20).nll == found.nll < score(made, tokens, 0, 20).nll
    with pytest.raises(DataError, match="outside the tokenizer's 20 ids"):
        score(made, [*tokens, 20], 0, 20, vocab_size=20)


def test_refusals() -> None:
    made = model("metala")
    with pytest.raises(ConfigError, match="stride of 9"):
        score(made, stream(5), 0, 8, 9)
    with pytest.raises(ConfigError, match="no token"):
        score(made, [], 0, 8)
    with pytest.raises(ValueError, match="learned 10 positions"):
        score(model("global", learned_positions=10), stream(30), 0, 20)
