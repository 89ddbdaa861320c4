"""Short ways to run a folder in vLLM inside a test, and to end it again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from tests.serving.engine.folders import Folder


@contextlib.contextmanager
def engine(folder: Folder, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` over a folder: fp32, no tokenizer, texts up to 512 tokens."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    usual = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512, "enforce_eager": True}
    llm = LLM(str(folder.path), **{**usual, **options})
    try:
        yield llm
    finally:
        with contextlib.suppress(AttributeError):  # of workers in other processes, where there are some
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any, given: Sequence[Sequence[int]], count: int, **more: Any) -> list[Any]:
    """One `RequestOutput` per prompt."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **more)
    return llm.generate([{"prompt_token_ids": list(p)} for p in given], how, use_tqdm=False)


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """The first text of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]
