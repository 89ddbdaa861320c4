"""The OpenAI-compatible server over an exported folder, used by OpenAI's own client: answers, load, memory, and its end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import linear_neox as ln
from tests.serving.engine.folders import SHAPES, make_folder
from tests.serving.engine.openai_server import Server

NEW = 48
LETTERS = "\n" + "".join(map(chr, range(32, 127)))
LOAD_S = 20.0


def make_tokenizer(path: Path) -> int:
    """A byte-level tokenizer of printable letters, so that any ids are a text; returns its number of ids."""
    bytes_of = dict(zip(LETTERS, ["Ċ", "Ġ", *LETTERS[2:]], strict=True))
    ids = {"<|endoftext|>": 0} | {bytes_of[letter]: number for number, letter in enumerate(LETTERS, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return len(ids)


class Case:
    """A running server, and prompts with the texts that the trainer writes after them."""

    def __init__(self, root: Path, name: str) -> None:
        count = make_tokenizer(root / "tokenizer.json")
        facts = {"tokenizer": {"type": "HFTokenizer", "vocab_size": count, "eod": 0, "pad": 0}}
        made = make_folder(root, name, SHAPES[name], facts=facts, tokenizer={"tokenizer.json": root / "tokenizer.json"})
        draw = random.Random(0)
        lengths = [1, 2, 7, 20, 33, 64, 65, 90, 128, 150, 200, 300] + [draw.randint(1, 120) for _ in range(52)]
        self.prompts = ["".join(draw.choices(LETTERS, k=n)) for n in lengths]
        self.texts: list[str] = ln.generate(
            ln.load_checkpoint(made.checkpoint), self.prompts, max_new_tokens=NEW, batch_size=64
        )
        self.long = [row for row, text in enumerate(self.texts) if len(text) == NEW]  # others end by themselves
        options = ["--max-model-len", "512", "--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--enforce-eager"]
        self.server = Server(made.path, root / "server.log", *options)
        try:
            self.server.wait_until_ready()
        except BaseException:
            self.server.kill()
            raise
        self.client = openai.OpenAI(base_url=f"{self.server.address}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(self, prompt: Any, **more: Any) -> Any:
        """A greedy completion."""
        return self.client.completions.create(model="ours", prompt=prompt, **{"max_tokens": NEW, "temperature": 0, **more})


@pytest.fixture(scope="module", params=["five_kinds"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(tmp_path_factory.mktemp("server"), request.param)
    yield made
    made.server.kill()


def test_a_completion_is_what_generate_writes(case: Case) -> None:
    row = case.long[0]
    answer = case.ask(case.prompts[row])
    assert answer.choices[0].text == case.texts[row] and len(set(case.texts[row])) > 10
    assert answer.usage.prompt_tokens == len(case.prompts[row]) and answer.choices[0].finish_reason == "length"


def test_a_batch_of_mixed_lengths(case: Case) -> None:
    answer = case.ask(case.prompts[:24])
    assert [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)] == case.texts[:24]


def test_streaming(case: Case) -> None:
    row = case.long[1]
    parts = [chunk.choices[0].text for chunk in case.ask(case.prompts[row], stream=True)]
    assert "".join(parts) == case.texts[row] and len(parts) > NEW // 2


def test_stop_words(case: Case) -> None:
    text = case.texts[case.long[2]]
    stop = text[20:23]
    answer = case.ask(case.prompts[case.long[2]], stop=[stop, "not in it \x00"])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == text[: text.index(stop)]


def test_log_probabilities(case: Case) -> None:
    row = case.long[3]
    answer = case.ask(case.prompts[row], logprobs=3).choices[0]
    assert "".join(answer.logprobs.tokens) == answer.text == case.texts[row]
    for chosen, entries in zip(answer.logprobs.token_logprobs, answer.logprobs.top_logprobs, strict=True):
        assert chosen == max(entries.values()) <= 0


def test_a_model_that_is_not_there_is_one_error(case: Case) -> None:
    with pytest.raises(openai.NotFoundError):
        case.client.completions.create(model="theirs", prompt="a", max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        case.ask("a" * 600)


def test_cancelled_requests_make_room_and_change_nothing(case: Case) -> None:
    streams = [case.ask(prompt, stream=True, max_tokens=180, extra_body={"ignore_eos": True}) for prompt in case.prompts[:12]]
    for stream in streams:
        next(iter(stream))
        stream.close()
    until = time.monotonic() + 60
    while case.server.metric("vllm:num_requests_running") and time.monotonic() < until:
        time.sleep(0.5)
    assert case.server.metric("vllm:num_requests_running") == 0
    assert [choice.text for choice in case.ask(case.prompts[:12]).choices] == case.texts[:12]


def test_64_at_once_for_a_while_and_memory_stays_level(case: Case, record_property: Callable[[str, object], None]) -> None:
    async def keep_asking(client: openai.AsyncOpenAI, number: int, until: float) -> int:
        count = 0
        while time.monotonic() < until or not count:
            row = (number + 7 * count) % len(case.prompts)
            answer = await client.completions.create(model="ours", prompt=case.prompts[row], max_tokens=NEW, temperature=0)
            assert answer.choices[0].text == case.texts[row]
            count += 1
        return count

    async def load() -> int:
        async with openai.AsyncOpenAI(base_url=f"{case.server.address}/v1", api_key="none", timeout=300) as client:
            until = time.monotonic() + LOAD_S
            return sum(await asyncio.gather(*(keep_asking(client, number, until) for number in range(64))))

    asyncio.run(load())  # buffers get their size
    before, answered = case.server.resident_mib(), []
    for _ in range(2):
        answered.append(asyncio.run(load()))
    after = case.server.resident_mib()
    record_property(f"answers in each of two rounds of {LOAD_S:.0f} s", answered)
    record_property("MiB resident before and after", [round(before), round(after)])
    assert min(answered) >= 64 and after - before < 32


def test_sigterm_ends_it(case: Case) -> None:
    """The last test of this file: nothing of the server is left."""
    code, alive = case.server.terminate()
    assert code == 0 and not alive
