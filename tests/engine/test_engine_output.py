"""`loss_chunk_tokens` through the engines: three steps equal the plain loss's: one process, tensor ranks, a pipeline.

fp32: losses within 2e-6, gradient norms within 2e-5 relative: the same sums in another order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.engine.base import EngineSettings
from megatron.engine.output import check_output
from megatron.errors import ConfigError
from megatron.model.objectives import Objective
from tests.engine.engine_cases import model_config, train
from tests.parallel.ranks import run_ranks

PLAIN = EngineSettings(gradient_accumulation=2)
CHUNKED = replace(PLAIN, loss_chunk_tokens=20)
JRT = Objective("jrt", 8)


def close(got: dict[str, list[float]], want: dict[str, list[float]]) -> bool:
    pairs = [(a, b, 2e-6) for a, b in zip(got["losses"], want["losses"], strict=True)]
    pairs += [(a, b, 2e-5) for a, b in zip(got["norms"], want["norms"], strict=True)]
    return all(abs(a - b) <= limit * b for a, b, limit in pairs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("objective", [Objective(), JRT], ids=["causal", "jrt"])
def test_single_process(tied: bool, objective: Objective) -> None:
    config = model_config(tied)
    want = train(1, 1, "single", replace(PLAIN, objective=objective), config, 3)
    got = train(1, 1, "single", replace(CHUNKED, objective=objective), config, 3)
    assert close(got, want) and got["eval"] == pytest.approx(want["eval"], rel=2e-6)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(("pp", "tp"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_bf16_keeps_the_gradient_of_the_output_matrix(pp: int, tp: int, tied: bool) -> None:
    """DeepSpeed clears gradients when one reaches the output of a stage: the matrix behind it has its own by then.

    10 losses within 0.5 % of one process: rounding per layout; without that gradient they are several per cent apart.
    """
    config, plain = model_config(tied), replace(PLAIN, dtype="bf16")
    want = train(1, 1, "single", plain, config, 10)
    for settings in (plain, replace(plain, loss_chunk_tokens=20)):
        got = run_ranks(train, 2, pp, tp, "deepspeed", settings, config, 10)[0]
        assert got["losses"] == pytest.approx(want["losses"], rel=5e-3)


@pytest.mark.parametrize(("pp", "tp", "tied"), [(1, 2, False), pytest.param(2, 1, True, marks=pytest.mark.slow)])
def test_tensor_ranks_and_a_pipeline(pp: int, tp: int, tied: bool) -> None:
    config = model_config(tied)
    want = train(1, 1, "single", PLAIN, config, 3)
    for got in run_ranks(train, 2, pp, tp, "deepspeed", CHUNKED, config, 3):
        assert close(got, want)


def test_what_needs_the_logits_is_refused() -> None:
    check_output(PLAIN)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        check_output(replace(CHUNKED, zero_stage=3))
