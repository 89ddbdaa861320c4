"""Needle prompts: exact lengths and depths, no leaks; the ladder gives 100 % to a perfect reader and 0 to a blind one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.data.tokenizer_base import Tokenizer
from megatron.data.tokenizers import CharLevelTokenizer, HFTokenizer
from megatron.errors import ConfigError, DataError
from megatron.evaluation.haystack import NoiseHaystack, TextHaystack
from megatron.evaluation.ladder import Cell, Plan, answer, cases, climb, summary, table
from megatron.evaluation.needle_sources import SyntheticSource, expanded, source_of
from megatron.evaluation.niah import CHOICES, KINDS, NiahSource
from megatron.evaluation.options import NEEDLES, NIAH
from megatron.synthetics.number_tokenizer import NumberTokenizer

TEXT = "The cat sat on the mat. A dog ran by!\nWho saw it? Nobody did. The end of the day came soon, and all was well.\n" * 40
BYTES = CharLevelTokenizer()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE tokenizer of 400 ids."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return HFTokenizer(path)


def source(name: str, tokenizer: Tokenizer) -> NiahSource:
    return NiahSource(name, tokenizer, TextHaystack(tokenizer.tokenize(TEXT), tokenizer, "TEXT"))


class Perfect:
    """Reads the prompt's text, looks the values up and says them; `values` False says them without looking."""

    def __init__(self, prompts: Tensor, tokenizer: Tokenizer, sees: bool = True) -> None:
        self.rows, self.at = [], 0
        for prompt in prompts.tolist():
            text = tokenizer.detokenize(prompt)
            asked = text.rpartition("The secret ")[2].split(" of ")[1].rpartition(" ")[0]
            keys = re.split(", | and ", asked)
            values = [v for key in keys for v in re.findall(rf"secret \w+ of {re.escape(key)} is ([0-9a-f-]+)\.", text)]
            said = ", ".join(values[:-1]) + " and " + values[-1] if len(values) > 1 else values[0]
            self.rows.append(tokenizer.tokenize_piece(f" {said}." if sees else " 0000000 and nothing else."))
        self.size = tokenizer.vocab_size

    def _logits(self, at: int) -> Tensor:
        logits = torch.zeros(len(self.rows), self.size)
        for row, ids in enumerate(self.rows):
            logits[row, ids[min(at, len(ids) - 1)]] = 50.0
        return logits

    def prefill(self) -> Tensor:
        return self._logits(0)

    def advance(self, tokens: Tensor) -> Tensor:
        self.at += 1
        return self._logits(self.at)

    def score(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.stack([self._logits(i) for i in range(answers.shape[1])], 1)
        scores = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        return scores, logits.argmax(-1) == answers


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_perfect_reader_finds_all_and_a_blind_one_nothing(name: str, kind: str, bpe: Tokenizer) -> None:
    tokenizer = BYTES if kind == "bytes" else bpe
    plan = Plan((1024,), (0.0, 0.5, 1.0), 3)
    rows = list(climb(source(name, tokenizer), lambda p: Perfect(p, tokenizer), tokenizer, plan))
    assert [row["accuracy"] for row in rows] == [1.0] * 3
    if name != "niah_multivalue":  # its values come in the order of the text, the answer's likelihood in that of the draw
        assert all(row["exact"] == row["choice"] == 1.0 and row["nll"] < 1e-3 for row in rows)
    blind = list(climb(source(name, tokenizer), lambda p: Perfect(p, tokenizer, sees=False), tokenizer, plan))
    assert all(row["accuracy"] == row["exact"] == 0.0 and row["nll"] > 5 for row in blind)


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("length", [700, 1023, 1024])
def test_lengths_and_depths_are_exact_and_answers_do_not_leak(name: str, length: int, bpe: Tokenizer) -> None:
    for tokenizer in (BYTES, bpe):
        made = source(name, tokenizer)
        for depth in (0.0, 0.25, 1.0):
            for case in cases(made, Plan((length,), (depth,), 3), length, depth):
                assert len(case.prompt) + case.room == length and len(case.answer) <= case.room
                text = tokenizer.detokenize(case.prompt.tolist())
                assert [text.count(value) for value in case.values] == [1] * len(case.values)
                assert len(set(case.choices)) == CHOICES
                for place, value in zip(case.places, case.values, strict=True):
                    after = tokenizer.detokenize(case.prompt[place:].tolist())
                    assert re.match(rf" The secret \w+ of \S+ is {value}\.", after)
                needles = sum(len(tokenizer.tokenize_piece(m)) for m in _needles(text, case, KINDS[name].haystack))
                head = len(tokenizer.tokenize_piece(text[: text.index("end.\n") + 5]))
                tail = len(tokenizer.tokenize_piece(text[text.rindex("\nQuestion") :]))
                size = len(case.prompt) - needles - head - tail
                before = sum(n for p, n in _sizes(case, tokenizer) if p < case.places[0])
                if KINDS[name].keys == 1:  # else needles that are not asked for may stand before it
                    assert case.places[0] - head - before == round(depth * size)


def _needles(text: str, case: Any, haystack: str) -> list[str]:
    """The needles that are not part of the haystack: those asked for, and of multikey_1 the three others."""
    every = re.findall(r" The secret \w+ of [\w-]+ is [0-9a-f-]+\.", text.split("\nQuestion")[0])
    return every if haystack != "needles" else [n for n in every if any(value in n for value in case.values)]


def _sizes(case: Any, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(place, tokens) of the needles that are asked for."""
    text = [tokenizer.detokenize(case.prompt[place:].tolist()) for place in case.places]
    return [(p, len(tokenizer.tokenize_piece(t[: t.index(".") + 1]))) for p, t in zip(case.places, text, strict=True)]


def test_a_seed_gives_the_same_prompts_and_examples_do_not_depend_on_their_number() -> None:
    made = source("niah_multikey_1", BYTES)
    few, many = (list(cases(made, Plan((900,), (0.5,), n), 900, 0.5)) for n in (2, 4))
    assert [c.prompt.tolist() for c in few] == [c.prompt.tolist() for c in many[:2]]
    assert len({tuple(c.prompt.tolist()) for c in many}) == 4
    other = list(cases(made, Plan((900,), (0.5,), 2, seed=7), 900, 0.5))
    assert other[0].values != few[0].values


def test_a_haystack_begins_a_sentence_at_the_needle_and_has_the_exact_size() -> None:
    rng = np.random.default_rng(0)
    for haystack in (NoiseHaystack(BYTES), TextHaystack(BYTES.tokenize(TEXT), BYTES, "TEXT")):
        for before, after in ((0, 50), (50, 0), (333, 20), (0, 0), (1000, 1000)):
            tape = haystack.tape(rng, before, after)
            assert len(tape.tokens) == before + after and {before, before + after} <= set(tape.starts.tolist())
            for start in tape.starts[(tape.starts > 0) & (tape.starts < before + after)]:
                assert chr(tape.tokens[start - 1]) in ".!?\n;:"


def test_documents_are_joined_without_their_ends() -> None:
    haystack = TextHaystack.of([np.asarray([65, 46, 0]), np.asarray([66, 46, 0])], "x", BYTES)
    assert 0 not in haystack.tape(np.random.default_rng(0), 2, 2).tokens


def test_the_training_tasks_are_asked_in_their_own_form() -> None:
    tokenizer = NumberTokenizer(64)
    spec = {"task": "needle", "vocab_size": 64, "valid": [{"length": 64, "needles": 3, "digits": 2, "examples": 8}]}
    made = source_of("needle", tokenizer, None, spec)
    for case in cases(made, Plan((300,), (0.5,), 5), 300, 0.5):
        key = int(case.prompt[-1])
        start = int(np.flatnonzero(case.prompt == key)[0])
        assert case.prompt[start - 1] == 1 and tuple(case.prompt[start + 1 : start + 3]) == case.answer
        assert len(case.prompt) == 300 - 1 and 145 <= start <= 155
        assert case.choices[0] == case.answer and len(set(case.choices)) == CHOICES
    text = SyntheticSource("needle_text", {"task": "needle_text", "train": [{"length": 200, "examples": 4}]}, BYTES)
    case = next(iter(cases(text, Plan((200,), (0.0,), 1), 200, 0.0)))
    assert BYTES.detokenize(case.answer) in BYTES.detokenize(case.prompt.tolist()) and len(set(case.choices)) == CHOICES
    with pytest.raises(ConfigError, match="training task"):
        source_of("needle", tokenizer, None, {"task": "mqar"})


def test_groups_and_words() -> None:
    assert expanded(["niah", "niah_single_1", "needle"]) == [*NIAH, "needle"]
    assert tuple(KINDS) == NIAH and set(NIAH) < set(NEEDLES)


def test_mistakes(bpe: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="hides its needles in a text"):
        NiahSource("niah_single_2", BYTES)
    with pytest.raises(DataError, match="does not fit into 100 tokens"):
        next(iter(cases(source("niah_single_1", BYTES), Plan((100,), (0.5,), 1), 100, 0.5)))
    short = NiahSource("niah_single_2", BYTES, TextHaystack(BYTES.tokenize("One. Two."), BYTES, "short.txt"))
    with pytest.raises(DataError, match="too short for a haystack"):
        next(iter(cases(short, Plan((1000,), (0.5,), 1), 1000, 0.5)))
    with pytest.raises(DataError, match="is no token"):
        NiahSource("niah_single_1", NumberTokenizer(64))
    with pytest.raises(DataError, match="cannot encode needles"):
        NiahSource("niah_single_1", _Lossy())
    with pytest.raises(ConfigError, match="depth of 1.5"):
        Plan((100,), (1.5,), 1)
    with pytest.raises(DataError, match="haystack is empty"):
        TextHaystack([], BYTES, "empty.txt")
    leak = TextHaystack(BYTES.tokenize(" ".join(str(n) for n in range(10))), BYTES, "digits")
    assert leak.tape(np.random.default_rng(0), 3, 4).tokens.shape == (7,)


class _Lossy(CharLevelTokenizer):
    """Forgets capital letters."""

    def tokenize(self, text: str) -> list[int]:
        return list(text.lower().encode())


def test_tables_and_summaries() -> None:
    rows = [
        {"task": "niah_single_1", "length": n, "depth": d, "accuracy": f, "exact": 0.0, "choice": 0.5}
        for n, d, f in ((1024, 0.0, 1.0), (1024, 1.0, 0.5), (2048, 0.0, 0.0), (2048, 1.0, 0.25))
    ]
    rows.append({"task": "niah_single_1", "length": 4096, "depth": 0.0, "error": "too long"})
    lines = table(rows).splitlines()
    assert lines[0].split()[-5:] == ["depth", "0", "depth", "1", "mean"]
    assert lines[1].split() == ["1024", "100.0", "50.0", "75.0"] and lines[3].split() == ["4096", "too", "long"]
    assert summary(rows)["niah_single_1@1024"] == {"accuracy": 0.75, "exact": 0.0, "choice": 0.5}
    assert "niah_single_1@4096" not in summary(rows)


def test_values_count_one_by_one() -> None:
    case = next(iter(cases(source("niah_multiquery", BYTES), Plan((1000,), (0.5,), 1), 1000, 0.5)))
    reader = Perfect(torch.from_numpy(case.prompt)[None], BYTES)
    said = BYTES.detokenize(reader.rows[0]).replace(case.values[2], "1111111")
    reader.rows = [BYTES.tokenize(said)]
    cell = Cell()
    answer([case], reader, BYTES, cell)
    assert cell.accuracy == [0.75] and cell.exact == [0.0] and cell.choice == [1.0]
    values = cell.report()["values"]
    assert [hit for _, hit in values] == [True, True, False, True] and values[0][0] == 0.5


@pytest.mark.slow
def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from megatron.evaluation.report import plot_ladder

    plan = Plan((700, 1000), (0.0, 1.0), 1)
    rows = list(climb(source("niah_single_1", BYTES), lambda p: Perfect(p, BYTES), BYTES, plan))
    published = {"Other, niah_single_1": {1024: 99.0, 2048: 50.0}}
    image = plot_ladder({"a": rows, "b": rows}, tmp_path / "a.png", "title", published)
    assert image.read_bytes().startswith(b"\x89PNG")
