"""What is refused before a model is built, and what a two-way prefix changes, each in the configuration that vLLM makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError
from tests.serving.engine.folders import SHAPES, Folder, make_folder, prompts, trainer_answers
from tests.serving.engine.serve import engine, greedy


def config_of(served: Folder, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    usual = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512}
    return EngineArgs(model=str(served.path), **{**usual, **options}).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"tensor_parallel_size": 4}, "cannot be split"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}, "speculative"),
        ({"quantization": "fp8"}, "quantised"),
    ],
)
def test_refused(folder: Callable[[str], Folder], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        config_of(folder("mamba" if "tensor_parallel_size" not in options else "five_kinds"), **options)


def test_prefix_caching_is_off_where_states_are_kept(folder: Callable[[str], Folder]) -> None:
    for name in ("metala", "five_kinds"):
        made = config_of(folder(name), enable_prefix_caching=True)
        assert not made.cache_config.enable_prefix_caching and made.cache_config.mamba_cache_mode == "none"
    assert config_of(folder("alibi"), enable_prefix_caching=True).cache_config.enable_prefix_caching


def test_a_two_way_prefix_is_read_in_one_piece(folder: Callable[[str], Folder]) -> None:
    made = config_of(folder("jrt"), max_num_batched_tokens=32, enable_prefix_caching=True)
    assert not made.scheduler_config.enable_chunked_prefill and made.scheduler_config.max_num_batched_tokens >= 512
    assert not made.cache_config.enable_prefix_caching


def test_a_two_way_prefix_beside_attention_needs_room_for_all(folder: Callable[[str], Folder]) -> None:
    """A preempted text would be read again with what was written as part of its prefix."""
    with (
        pytest.raises(ConfigError, match="pages are too few"),
        engine(folder("jrt_global"), max_num_seqs=8, num_gpu_blocks_override=12),
    ):
        pass


def test_ids_that_only_pad_the_vocabulary_are_never_chosen(tmp_path: Path) -> None:
    """`--keep-padding` keeps 259 rows of a tokenizer with 40 ids."""
    shape = SHAPES["metala"]
    served = make_folder(tmp_path, "kept", shape, facts={"tokenizer": {"vocab_size": 40}}, keep_padding=True)
    given = prompts(40, [5, 20])
    with engine(served, max_num_seqs=2) as llm:
        outputs = greedy(llm, given, 24)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    assert answers == trainer_answers(served, given, 24, vocabulary=40)
    assert trainer_answers(served, given, 24) != answers
