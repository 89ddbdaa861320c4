"""Bad numbers: the same step is skipped everywhere, nothing changes by a bit, the samples are named, and there is a budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.layout import complete_steps
from megatron.engine.base import StepResult
from megatron.engine.schedule import learning_rate
from megatron.engine.skip_step import StepLimits, should_skip
from megatron.errors import ConfigError, TrainingError
from megatron.reliability.consensus import Consensus
from megatron.reliability.guard import StepGuard
from megatron.reliability.guard_options import GuardOptions
from megatron.reliability.stop import Control
from megatron.training.intervals import SaveRule
from tests.faults.guards_count import CASES, check
from tests.parallel.ranks import RankError, run_ranks
from tests.training.runs import CURVE, make_engine, options, train

FEW = ("single-bf16", "pp2-fp32", "tp2-bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_injected_faults_change_nothing(name: str) -> None:
    assert check(name, 4, seed=3) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(FEW)))
def test_injected_faults_in_the_other_cases(name: str) -> None:
    assert check(name, 4, seed=11) == 4


def _one_rank_disagrees() -> None:
    engine = make_engine(kind="deepspeed", zero_stage=1)
    real = engine.train_step

    def train_step(batches: Any, lr: float) -> StepResult:
        result = real(batches, lr)
        return StepResult(result.loss, result.grad_norm, engine.mesh.rank == 1)

    engine.train_step = train_step  # type: ignore[method-assign]
    train(engine, None, options(5), control=Control(Consensus.of_all_ranks()))


@pytest.mark.slow
def test_ranks_that_do_not_agree_stop() -> None:
    with pytest.raises(RankError, match="the ranks do not agree whether the last step was skipped"):
        run_ranks(_one_rank_disagrees, 2)


def _bad_from(engine: Any, first: int, last: int) -> Any:
    """Every step from `first` to `last` finds a loss that is not a number, whatever the data say."""
    real, taken = engine.train_step, [0]

    def train_step(batches: Any, lr: float) -> StepResult:
        taken[0] += 1
        if first <= taken[0] <= last:
            engine.limits = StepLimits(loss=-1.0)  # refuses the step inside the engine, as a bad number does
            result = real(batches, lr)
            return StepResult(torch.tensor(math.nan), result.grad_norm, result.skipped)
        return real(batches, lr)

    engine.train_step = train_step
    return engine


def test_a_spent_budget_stops_with_the_samples(tmp_path: Path) -> None:
    rule = SaveRule(factor=4, train_iters=20)
    engine = _bad_from(make_engine(), 4, 99)
    with pytest.raises(TrainingError) as caught:
        train(engine, tmp_path, options(20, save_rule=rule, guard=GuardOptions(budget=2)))
    text = str(caught.value)
    assert "step 6: the loss is nan; 3 steps were skipped within 1000, 2 are allowed" in text
    assert "samples 40 to 47" in text
    assert "the last good checkpoint is of step 4" in text
    assert caught.value.exit_code == 7


def test_a_spent_budget_rewinds_past_the_samples(tmp_path: Path) -> None:
    rule = SaveRule(factor=3, train_iters=20)
    rules = GuardOptions(budget=1, on_budget="rewind")
    engine = _bad_from(make_engine(), 6, 7)
    run, recorder = train(engine, tmp_path, options(12, save_rule=rule, guard=rules))
    # Step 6 was skipped and forgiven, and saved; step 7 was one too many: back to step 6's checkpoint, on with step 8.
    assert [word for word in recorder.heard if word.startswith(("skip", "rewind"))] == ["skip 6", "skip 7", "rewind 6"]
    assert (run.state.iteration, run.state.skipped_iterations, run.state.rewinds) == (12, 2, 1)
    assert run.state.consumed_samples == 12 * 8, "no sample is seen twice"
    early = _bad_from(make_engine(), 5, 6)
    run, recorder = train(early, tmp_path / "b", options(9, save_rule=SaveRule(factor=4, train_iters=20), guard=rules))
    assert "rewind 4" in recorder.heard
    assert run.state.applied_iterations == 9 - 2
    late = [s for s in recorder.steps if s.iteration > 6]
    assert [list(s.sample_ids) for s in late] == [list(range(8 * i - 8, 8 * i)) for i in (7, 8, 9)]
    assert late[0].learning_rate == learning_rate(4, CURVE), "the schedule went back with the weights"
    assert 9 in complete_steps(tmp_path / "b")


def test_rewinds_have_a_limit_and_need_a_checkpoint(tmp_path: Path) -> None:
    rules = GuardOptions(budget=0, on_budget="rewind", max_rewinds=2)
    with pytest.raises(TrainingError, match="step 6: the loss is nan"):
        train(_bad_from(make_engine(), 4, 99), tmp_path, options(20, save_rule=SaveRule(factor=3, train_iters=20), guard=rules))
    with pytest.raises(TrainingError, match="step 2: the loss is nan"):
        train(_bad_from(make_engine(), 2, 99), tmp_path / "b", options(20, guard=rules))


def test_the_budget_counts_inside_its_window() -> None:
    guard = StepGuard(GuardOptions(budget=1, window=10))
    assert not guard.decide(5, math.nan, 1.0, True).budget_exhausted
    assert guard.decide(14, math.nan, 1.0, True).budget_exhausted
    guard = StepGuard(GuardOptions(budget=1, window=10))
    assert not guard.decide(5, math.nan, 1.0, True).budget_exhausted
    assert not guard.decide(15, 1.0, math.inf, True).budget_exhausted


def test_overflows_of_a_searched_loss_scale_have_their_own_limit() -> None:
    guard = StepGuard(GuardOptions(budget=0, overflows=3), scaled=True)
    judged = [guard.decide(i, 2.0, math.inf, True).budget_exhausted for i in (1, 2)]
    guard.decide(3, 2.0, 1.0, False)
    judged += [guard.decide(i, 2.0, math.inf, True).budget_exhausted for i in (4, 5, 6)]
    assert judged == [False, False, False, False, True]
    assert guard.decide(7, math.nan, math.inf, True).reason == "the loss is nan"


def test_the_spike_rule_waits_for_its_window_and_survives_a_resume() -> None:
    rules = GuardOptions(spike_sigma=6.0, spike_window=8)
    guard = StepGuard(rules)
    for step in range(8):
        assert guard.limits() == StepLimits()
        guard.decide(step, 3.0 + 0.01 * (step % 2), 1.0, False)
    limits = guard.limits()
    assert 3.0 < limits.loss < 3.6
    assert 1.0 < limits.grad_norm < 1.2
    assert "a spike: the loss 9" in guard.decide(9, 9.0, 1.0, True).reason
    assert "a spike: the gradient norm 7" in guard.decide(10, 3.0, 7.0, True).reason
    again = StepGuard(rules)
    again.load(guard.state())
    assert again.limits() == limits
    assert again.state() == guard.state()
    assert again.state()["skips"] == [9, 10]
    again.reset()
    assert again.limits() == StepLimits()
    assert not again.state()


@pytest.mark.parametrize(
    ("loss", "norm", "refused"),
    [
        (1.0, 1.0, 0.0),
        (math.nan, 1.0, 1.0),
        (math.inf, 1.0, 1.0),
        (1.0, math.nan, 1.0),
        (1.0, -1.0, 1.0),
        (3.0, 1.0, 1.0),
        (1.0, 3.0, 1.0),
    ],
)
def test_veto(loss: float, norm: float, refused: float) -> None:
    assert float(should_skip(torch.tensor(loss), torch.tensor(norm), StepLimits(2.0, 2.0))) == refused


@pytest.mark.parametrize("keys", [{"on_budget": "pray"}, {"spike_sigma": 6.0, "spike_window": 4}])
def test_rules_that_make_no_sense(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GuardOptions(**keys)
