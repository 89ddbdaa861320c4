"""Served greedy tokens are the trainer's own: every kind of model, prompts of 1 to 300 tokens mixed in one batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.serving.engine.folders import LENGTHS, SHAPES, Folder, prompts, trainer_answers, trainer_logits
from tests.serving.engine.serve import engine, greedy, tokens

NEW = 64


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("budget", "sequences"), [(32, 2), (64, 8)])
def test_24_prompts_x_64_tokens(folder: Callable[[str], Folder], name: str, budget: int, sequences: int) -> None:
    """`budget` tokens per step cut longer prompts into pieces, but for JRT's, which are read whole."""
    served, given = folder(name), prompts(SHAPES[name].vocab_size)
    assert len(given) == 24 and max(LENGTHS) == 300
    with engine(served, max_num_batched_tokens=budget, max_num_seqs=sequences) as llm:
        answers = tokens(greedy(llm, given, NEW))
    expected = trainer_answers(served, given, NEW)
    assert len({t for answer in expected for t in answer}) > 50, "a model that says little would hide a wrong state"
    assert answers == expected


@pytest.mark.parametrize("name", ["metala", "based", "mamba", "llama", "five_kinds", "jrt"])
def test_two_tensor_parallel_processes(folder: Callable[[str], Folder], name: str) -> None:
    """An odd vocabulary as well: 259 rows over two ranks."""
    served, given = folder(name), prompts(SHAPES[name].vocab_size)[::3]
    with engine(served, max_num_batched_tokens=64, max_num_seqs=4, tensor_parallel_size=2) as llm:
        answers = tokens(greedy(llm, given, NEW))
    assert answers == trainer_answers(served, given, NEW)


BF16_LARGEST, BF16_MEAN = 0.8, 0.1
"""Of log probabilities, absolute, against fp32; the trainer's own bf16 pass, with these random weights, is as far off."""


@pytest.mark.parametrize("name", ["metala", "based", "jrt", "mamba", "five_kinds"])
def test_bf16_log_probabilities_are_within_the_limit(
    folder: Callable[[str], Folder], name: str, record_property: Callable[[str, object], None]
) -> None:
    served, given = folder(name), prompts(SHAPES[name].vocab_size)[5:21:5]
    with engine(served, dtype="bfloat16", max_num_batched_tokens=64, max_num_seqs=4) as llm:
        outputs = greedy(llm, given, 16, logprobs=3)
    ours, theirs = [], []
    for prompt, output in zip(given, outputs, strict=True):
        answer = output.outputs[0]
        text = list(prompt) + list(answer.token_ids)
        wide, narrow = (
            trainer_logits(served, text, len(prompt), kind).float().log_softmax(-1) for kind in (torch.float32, torch.bfloat16)
        )
        for place, entries in enumerate(answer.logprobs, len(prompt) - 1):
            for token, entry in entries.items():
                ours.append(abs(entry.logprob - float(wide[place, token])))
                theirs.append(abs(float(narrow[place, token] - wide[place, token])))
    means = [sum(each) / len(each) for each in (ours, theirs)]
    for whose, values, mean in (("served", ours, means[0]), ("trainer", theirs, means[1])):
        record_property(f"{whose}, largest difference to fp32", round(max(values), 4))
        record_property(f"{whose}, mean difference to fp32", round(mean, 4))
    assert max(ours) <= BF16_LARGEST and means[0] <= BF16_MEAN
    assert max(theirs) <= BF16_LARGEST and means[1] <= BF16_MEAN
