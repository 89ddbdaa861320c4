"""Generation: the state changes nothing, batches change nothing, seeds repeat, filters are the textbook ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.errors import CheckpointError, ConfigError
from megatron.generation.load import filled_model
from megatron.generation.sample import Sampling, filter_logits, generate, sample_tokens
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, mlp_width=48, layer_types=("metala", "metala"))
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [], [3, 1, 4, 1, 5], [2, 7]]
EOD = 63


def weights(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s.shape, generator=generator, dtype=torch.float64) * 0.5 for n, s in param_specs(config).items()}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return filled_model(CONFIG, weights())


def texts(model: LanguageModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    made = generate(model, prompts, Sampling(**{"maximum_tokens": 12, **options}), eod=EOD)
    return [result.tokens for result in made]


def test_greedy_is_the_likeliest_token_of_a_whole_pass(model: LanguageModel) -> None:
    made = texts(model, PROMPTS)
    for prompt, new in zip(PROMPTS, made, strict=True):
        so_far = prompt or [EOD]
        for token in new:
            assert int(model(torch.tensor([so_far]))[0][0, -1].argmax()) == token
            so_far = [*so_far, token]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"top_k": 5}, {"top_p": 0.7, "temperature": 2.0}])
def test_batch_single_and_recompute_agree(model: LanguageModel, options: dict[str, Any]) -> None:
    together = texts(model, PROMPTS, **options)
    assert together == texts(model, PROMPTS, recompute=True, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], Sampling(maximum_tokens=12, **options), eod=EOD, first_row=row)
        assert alone[0].tokens == together[row]


def test_seeds(model: LanguageModel) -> None:
    def draw(seed: int) -> list[list[int]]:
        return texts(model, [[], [], []], temperature=5.0, seed=seed)

    assert draw(1) == draw(1) and draw(1) != draw(2)
    first, second, third = draw(1)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_end_of_text(model: LanguageModel) -> None:
    whole = texts(model, [PROMPTS[0]])[0]
    stop = whole[4]
    result = generate(model, [PROMPTS[0]], Sampling(maximum_tokens=12), eod=stop)[0]
    assert result.finished and result.tokens == whole[: whole.index(stop)] and result.message is None
    by_stop = generate(model, [PROMPTS[0]], Sampling(maximum_tokens=12, stop_tokens=(stop,)), eod=EOD)[0]
    assert by_stop.finished and by_stop.tokens == result.tokens
    assert not generate(model, [PROMPTS[0]], Sampling(maximum_tokens=3), eod=EOD)[0].finished


def test_length_limit(model: LanguageModel) -> None:
    made = generate(model, [[1] * 8, [1] * 30, [1]], Sampling(maximum_tokens=12, max_length=10), eod=EOD)
    assert [len(result.tokens) for result in made] == [2, 0, 9]
    assert made[0].message and "room for 2 of 12" in made[0].message
    assert made[1].message and "room for 0" in made[1].message


def test_rows_beyond_the_vocabulary_are_never_chosen(model: LanguageModel) -> None:
    made = generate(model, [[1], [2]], Sampling(maximum_tokens=40, temperature=9.0), eod=EOD, vocab_size=20)
    assert all(token < 20 for result in made for token in result.tokens)


def test_logits_are_kept_when_asked(model: LanguageModel) -> None:
    made = generate(model, [[1, 2, 3]], Sampling(maximum_tokens=5, return_logits=True), eod=EOD, vocab_size=50)[0]
    assert len(made.logits) == len(made.tokens) and all(row.shape == (50,) for row in made.logits)
    assert [int(row.argmax()) for row in made.logits] == made.tokens


def test_filters() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))

    def kept(**options: Any) -> list[list[int]]:
        return [torch.isfinite(row).nonzero().flatten().tolist() for row in filter_logits(logits, Sampling(**options))]

    assert kept(top_k=2) == [[0, 1], [2, 3]] and kept(top_k=9) == [[0, 1, 2, 3]] * 2
    assert kept(top_p=0.5) == [[0], [2, 3]] and kept(top_p=0.76) == [[0, 1, 2], [1, 2, 3]]
    assert kept(top_p=1e-6) == [[0], [3]]
    assert torch.allclose(filter_logits(logits, Sampling(temperature=2.0)), logits / 2)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([[0.6, 0.3, 0.1]])
    generator = torch.Generator().manual_seed(0)
    drawn = [int(sample_tokens(probabilities.log(), Sampling(temperature=1.0), [generator])) for _ in range(3000)]
    share = torch.tensor(drawn).bincount(minlength=3) / 3000
    assert torch.allclose(share, probabilities[0], atol=0.03)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}, {"maximum_tokens": 0}])
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)


def test_weights_that_do_not_fit() -> None:
    partial = weights()
    partial.pop("model.layers.0.token_mixer.aug_balance")
    with pytest.raises(CheckpointError, match="do not fit"):
        filled_model(CONFIG, partial)


def test_nothing_asked_nothing_done(model: LanguageModel) -> None:
    assert generate(model, [], Sampling(), eod=EOD) == []
