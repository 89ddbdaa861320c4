"""What happens to sequences in a server: preempted, aborted, sampled several times, begun in a page that another one left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.engine.folders import SHAPES, Folder, prompts, trainer_answers
from tests.serving.engine.serve import engine, greedy, tokens


@pytest.mark.parametrize(("name", "pages"), [("metala_global", 21), ("five_kinds", 24)])
def test_preempted_sequences_are_read_again_from_nothing(folder: Callable[[str], Folder], name: str, pages: int) -> None:
    """A cache for fewer than three of eight texts: sequences lose their pages in the middle and get others."""
    served, given = folder(name), prompts(SHAPES[name].vocab_size, [200, 150, 190, 120, 170, 90, 180, 60])
    with engine(served, max_num_batched_tokens=64, max_num_seqs=8, num_gpu_blocks_override=pages, block_size=32) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted, usual = [], scheduler._preempt_request
        scheduler._preempt_request = lambda request, *a, **k: (preempted.append(request.request_id), usual(request, *a, **k))[1]
        answers = tokens(greedy(llm, given, 64))
    assert preempted
    assert answers == trainer_answers(served, given, 64)


@pytest.mark.parametrize("name", ["metala", "five_kinds"])
def test_aborted_sequences_leave_nothing_behind(folder: Callable[[str], Folder], name: str) -> None:
    """Half of the texts are given up after a few steps; others take their pages, among them texts of one token."""
    served, given = folder(name), prompts(SHAPES[name].vocab_size, [30, 70, 45, 100, 9, 1, 64, 1])
    with engine(served, max_num_batched_tokens=64, max_num_seqs=4) as llm:
        inner = llm.llm_engine
        for number, prompt in enumerate(given[:4]):
            inner.add_request(f"first-{number}", {"prompt_token_ids": prompt}, _how(40))
        for _ in range(8):
            inner.step()
        inner.abort_request(["first-0", "first-2"])
        for number, prompt in enumerate(given[4:]):
            inner.add_request(f"second-{number}", {"prompt_token_ids": prompt}, _how(40))
        finished = _run_out(inner)
    expected = trainer_answers(served, given, 40)
    wanted = {f"first-{i}": expected[i] for i in (1, 3)} | {f"second-{i}": expected[4 + i] for i in range(4)}
    assert {name: answer for name, answer in finished.items() if len(answer) == 40} == wanted


def _how(count: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)


def _run_out(inner: Any) -> dict[str, list[int]]:
    finished = {}
    while inner.has_unfinished_requests():
        for output in inner.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    return finished


def test_several_samples_of_a_prompt_are_those_of_single_requests(folder: Callable[[str], Folder]) -> None:
    from vllm import SamplingParams

    served, given = folder("five_kinds"), prompts(SHAPES["five_kinds"].vocab_size, [50, 3])
    usual = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    with engine(served, max_num_batched_tokens=256, max_num_seqs=6) as llm:  # a prompt in pieces and a seed: not on vLLM's CPU
        inputs = [{"prompt_token_ids": p} for p in given]
        several = llm.generate(inputs, SamplingParams(n=3, seed=7, **usual), use_tqdm=False)
        single = [llm.generate(inputs, SamplingParams(seed=7 + i, **usual), use_tqdm=False) for i in range(3)]
    for row, output in enumerate(several):
        drawn = [list(answer.token_ids) for answer in output.outputs]
        assert drawn == [list(one[row].outputs[0].token_ids) for one in single]
        assert len({tuple(answer) for answer in drawn}) == 3
