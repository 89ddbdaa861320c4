"""Rows of a pass: what is read and scored; and scores and texts that do not depend on the batch, for every kind of mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron.data.tokenizers import build_tokenizer
from megatron.errors import ConfigError
from megatron.evaluation.batching import prompt_rows, score_batches, score_row, score_tensors, share_rows
from megatron.evaluation.forward import Forward, ForwardBatch
from megatron.evaluation.lm_eval_model import HarnessLM
from megatron.evaluation.options import HarnessOptions, Prefix
from megatron.generation.load import filled_model
from megatron.generation.prompts import FILLER
from megatron.layers.base import Context
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from tests.evaluation.tiny import tiny_config

JRT = {"jrt": {"prefix_length": 16}}
MODELS: dict[str, ModelConfig] = {
    "metala": tiny_config("metala", "metala"),
    "based": tiny_config("base_conv", "based", "sliding", layer_options={"sliding": {"window": 6}}),
    "jrt": tiny_config("base_conv", "jrt", layer_options=JRT),
    "softmax": tiny_config("global", "global"),
}
TEXTS = ["a cat", "the dog is in the house", "x", "Name: Anna and Ben went to Paris", "the cat", "mat on a mat on a mat"]


def test_rows_read_the_last_tokens_and_score_the_continuation() -> None:
    row = score_row([1, 2, 3], [4, 5], 10, Prefix())
    assert (row.tokens, row.prefix, row.spans) == ([1, 2, 3, 4], None, [(0, 2, [4, 5])])
    assert score_row([1, 2, 3], [4, 5], 3, Prefix()).tokens == [2, 3, 4]
    long = score_row([1], [2, 3, 4, 5], 2, Prefix())  # a continuation that does not fit is scored where it fits
    assert (long.tokens, long.spans) == ([3, 4], [(0, 0, [4, 5])])


def test_rows_of_prefix_models() -> None:
    row = score_row([1, 2], [4, 5], 99, Prefix(6, "left_pad"))
    assert (row.tokens, row.prefix, row.hidden, row.spans) == ([220] * 4 + [1, 2, 4], 6, 4, [(0, 5, [4, 5])])
    twice = score_row([1, 2], [4, 5], 99, Prefix(5, "read_twice"))
    assert (twice.tokens, twice.prefix, twice.hidden) == ([2, 1, 2, 1, 2, 4], 5, 0)
    plain = score_row([1, 2], [4, 5], 99, Prefix(6))
    assert (plain.tokens, plain.prefix) == ([1, 2, 4], 2)
    whole = score_row([1, 2], [4, 5], 99, Prefix(6, "left_pad", "whole"))  # six tokens with the continuation, as released
    assert (whole.tokens, whole.prefix, whole.hidden, whole.spans) == ([220, 220, 1, 2, 4], 5, 2, [(0, 3, [4, 5])])
    assert Prefix().filler == FILLER
    with pytest.raises(ConfigError, match="this model has none"):
        Prefix(0, "left_pad")
    with pytest.raises(ConfigError, match="unknown prompt mode"):
        Prefix(4, "twice")


def test_equal_rows_are_run_once_and_batches_keep_prefixes_apart() -> None:
    rows = [score_row([1, 2], [n], 9, Prefix()) for n in (3, 4, 5)] + [score_row([1], [2, 9], 9, Prefix())]
    shared = share_rows(rows)
    assert len(shared) == 1 and [n for n, _, _ in shared[0].spans] == [0, 1, 2, 3]
    passed, places, targets = score_tensors(shared)
    assert passed.tokens.tolist() == [[1, 2]] and passed.mask is None
    assert places.tolist() == [[0, 1], [0, 1], [0, 1], [0, 0], [0, 1]] and targets.tolist() == [3, 4, 5, 2, 9]
    mixed = [score_row([1] * n, [2] * m, 9, Prefix(4)) for n, m in ((1, 2), (3, 1), (1, 5), (3, 2), (3, 3), (6, 1))]
    batches = [[(row.prefix, len(row.tokens)) for row in batch] for batch in score_batches(mixed, 2)]
    assert batches == [[(1, 5), (1, 2)], [(3, 5), (3, 4)], [(3, 3)], [(4, 6)]]


def model_of(config: ModelConfig, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, spec in param_specs(config).items():
        value = torch.randn(spec.shape, generator=generator) * (0.25 if len(spec.shape) > 1 else 0.1)
        weights[name] = value + (1.0 if "norm" in name else 0.0)
    return filled_model(config, weights, dtype=dtype)


def harness(model: Any, batch: int, prefix: Prefix | None = None) -> HarnessLM:
    forward = Forward(model, Mesh.single(), 512, torch.device("cpu"))
    options = HarnessOptions(max_length=64, batch_size=batch, prefix=prefix or Prefix())
    return HarnessLM(forward, build_tokenizer("CharLevelTokenizer"), options)


def requests(kind: str) -> list[Instance]:
    given: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(text, f" {other}") for text in TEXTS for other in TEXTS[:2]] + [("", "mat"), ("cat", "s")],
        "loglikelihood_rolling": [(text * 3,) for text in TEXTS],
        "generate_until": [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in TEXTS],
    }
    return [Instance(kind, {}, arguments, 0) for arguments in given[kind]]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    """fp64: 1e-12 of the score, so no padding is seen. fp32: 5e-6, its rounding where matrices have another number of rows."""
    model, close = model_of(MODELS[name], dtype), 1e-12 if dtype == torch.float64 else 5e-6
    prefixes = [Prefix()]
    if name == "jrt":
        prefixes = [Prefix(16, mode, scope) for mode in ("plain", "left_pad") for scope in ("context", "whole")]
        prefixes.append(Prefix(16, "read_twice"))
    for prefix in prefixes:
        alone, together = harness(model, 1, prefix), harness(model, 5, prefix)
        one, many = (lm.loglikelihood(requests("loglikelihood"), disable_tqdm=True) for lm in (alone, together))
        assert [greedy for _, greedy in one] == [greedy for _, greedy in many]
        assert [value for value, _ in one] == pytest.approx([value for value, _ in many], rel=close)
        rolled = [lm.loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True) for lm in (alone, together)]
        assert rolled[0] == pytest.approx(rolled[1], rel=close)
        said = [lm.generate_until(requests("generate_until"), disable_tqdm=True) for lm in (alone, together)]
        assert said[0] == said[1] and len(set(said[0])) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_next_logits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    """Of a left-padded prompt and of eight tokens after it, which the state carries on; of the largest logit, fp64 to 1e-12.

    fp32 to 3e-5: padding moves the chunks that a recurrence is summed in, and a state is a long sum.
    """
    model, close = model_of(MODELS[name], dtype), 1e-12 if dtype == torch.float64 else 3e-5
    prompts = [list(text.encode()) for text in TEXTS]
    prefix = Prefix(16 if name == "jrt" else 0)
    lone, all_rows = harness(model, 1, prefix), harness(model, 6, prefix)
    found = [all_rows.forward.prefill(prompt_rows(prompts, prefix))]
    found += [all_rows.forward.advance(torch.full((6,), 97 + i)) for i in range(8)]
    for row, prompt in enumerate(prompts):
        wanted = [lone.forward.prefill(prompt_rows([prompt], prefix))]
        wanted += [lone.forward.advance(torch.tensor([97 + i])) for i in range(8)]
        for many, one in zip(found, wanted, strict=True):
            assert float((many[row] - one[0]).abs().max()) < close * float(one.abs().max())


def test_scores_are_the_models_log_probabilities() -> None:
    """Against a plain pass over the whole text, over the tokenizer's 512 ids and not the 520 rows of the table."""
    model = model_of(MODELS["based"], torch.float64)
    ids = torch.tensor(list(b"the cat sat"))
    logits = model(ids[None])[0].detach()[0, :, :512].log_softmax(-1)
    wanted = sum(float(logits[i - 1, ids[i]]) for i in range(7, 11))
    value, greedy = harness(model, 1).loglikelihood([Instance("loglikelihood", {}, ("the cat", " sat"), 0)], True)[0]
    assert value == pytest.approx(wanted, abs=1e-12) and not greedy


def test_a_jrt_score_is_that_of_generation_unless_the_prefix_is_the_whole() -> None:
    model = model_of(MODELS["jrt"], torch.float64)
    asked = [Instance("loglikelihood", {}, ("the cat", " sat"), 0)]
    forward = harness(model, 1).forward
    ids = list(b"the cat sat")
    steps = [forward.prefill(ForwardBatch(torch.tensor([ids[:7]])))]
    steps += [forward.advance(torch.tensor([token])) for token in ids[7:-1]]
    stepped = sum(float(logits.log_softmax(-1)[0, token]) for logits, token in zip(steps, ids[7:], strict=True))
    assert harness(model, 1, Prefix(16)).loglikelihood(asked, True)[0][0] == pytest.approx(stepped, abs=1e-10)
    seen = model(torch.tensor([ids[:-1]]), Context())[0].detach()[0, :, :512].log_softmax(-1)
    whole = harness(model, 1, Prefix(16, scope="whole")).loglikelihood(asked, True)[0][0]
    assert whole == pytest.approx(sum(float(seen[i - 1, ids[i]]) for i in range(7, 11)), abs=1e-10)
    assert abs(whole - stepped) > 1e-3


def test_generation_arguments() -> None:
    lm = harness(model_of(MODELS["metala"], torch.float32), 4)

    def say(**arguments: Any) -> str:
        return lm.generate_until([Instance("generate_until", {}, ("the cat", arguments), 0)], disable_tqdm=True)[0]

    text = say(until=[], max_gen_toks=10)
    assert len(text) >= 3 and say(until=[text[2]], max_gen_toks=10) == text.split(text[2])[0]
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10, "until": []}
    assert say(**drawn) == say(**drawn) != text
    with pytest.raises(ConfigError, match="num_beams"):
        say(num_beams=4)
    with pytest.raises(ConfigError, match="no room"):
        say(max_gen_toks=64)
