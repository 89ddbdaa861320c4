"""The loop: what happens when, what is remembered, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.layout import complete_steps
from megatron.engine.base import StepResult
from megatron.errors import TrainingError
from megatron.observe.jsonl import read_rows
from megatron.reliability.guard_options import GuardOptions
from megatron.training.hooks import Hook, Run, Step
from megatron.training.intervals import SaveRule
from megatron.training.state import TrainState
from tests.training.runs import make_engine, options, train


def test_order_of_moments(tmp_path: Path) -> None:
    rule = SaveRule(factor=2, extra=(0,), train_iters=5)
    run, recorder = train(make_engine(), tmp_path, options(5, save_rule=rule, eval_interval=2))
    assert recorder.heard == [
        "start",
        "save global_step0",
        "step 1",
        "step 2",
        "save global_step2",
        "validation 2",
        "step 3",
        "step 4",
        "save global_step4",
        "validation 4",
        "step 5",
        "validation 5",
        "save global_step5",
        "finished",
    ]
    assert run.state.iteration == 5
    assert run.state.consumed_samples == 5 * 8
    assert run.state.consumed_tokens == 5 * 8 * 16
    assert sorted(complete_steps(tmp_path)) == [0, 2, 4, 5]
    assert (tmp_path / "latest").read_text() == "global_step5"


def test_each_step_sees_its_own_samples(tmp_path: Path) -> None:
    _, recorder = train(make_engine(), None, options(3))
    assert [list(s.sample_ids) for s in recorder.steps] == [list(range(8 * i, 8 * i + 8)) for i in range(3)]


def test_learning_rate_is_the_schedule_of_the_steps_before(tmp_path: Path) -> None:
    from megatron.engine.schedule import learning_rate
    from tests.training.runs import CURVE

    _, recorder = train(make_engine(), None, options(4))
    assert [s.learning_rate for s in recorder.steps] == [learning_rate(n, CURVE) for n in range(4)]


def test_the_validation_subset_is_fixed(tmp_path: Path) -> None:
    engine = make_engine()
    from megatron.training.evaluate import Evaluator
    from tests.training.runs import micros

    opened = []

    def open_batches() -> Any:
        opened.append(1)
        return micros(engine.mesh, 500)

    fixed = Evaluator(engine, open_batches, 2)
    assert fixed().loss == fixed().loss
    assert fixed().batches == 4
    assert len(opened) == 3
    moving = Evaluator(engine, open_batches, 2, fixed=False)
    assert moving().loss != moving().loss
    assert len(opened) == 4


def test_exit_interval_saves_and_says_why(tmp_path: Path) -> None:
    run, recorder = train(make_engine(), tmp_path, options(20, exit_interval=3))
    assert run.stop == "exit_interval 3"
    assert run.state.iteration == 3
    assert sorted(complete_steps(tmp_path)) == [3]
    assert recorder.heard[-1] == "stopped: exit_interval 3"
    assert "validation 3" not in recorder.heard


def test_a_hook_may_stop_the_run(tmp_path: Path) -> None:
    class Stopper(Hook):
        def on_step(self, run: Run, step: Step) -> None:
            if step.iteration == 2:
                run.request_stop("enough")

    run, _ = train(make_engine(), tmp_path, options(20), hooks=[Stopper()])
    assert (run.stop, run.state.iteration, sorted(complete_steps(tmp_path))) == ("enough", 2, [2])


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    _, whole = train(make_engine(), None, options(20))
    train(make_engine(), tmp_path, options(20, exit_interval=7))
    run, rest = train(make_engine(seed=99), tmp_path, options(20), resume=True)
    assert [s.iteration for s in rest.steps] == list(range(8, 21))
    assert [s.loss for s in rest.steps] == [s.loss for s in whole.steps[7:]]
    assert [s.grad_norm for s in rest.steps] == [s.grad_norm for s in whole.steps[7:]]
    assert [s.sample_ids for s in rest.steps] == [s.sample_ids for s in whole.steps[7:]]
    assert run.state.consumed_samples == 160


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_resume_is_bit_equal_in_half_precision(tmp_path: Path, dtype: str) -> None:
    fp16 = {"fp16": {"loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 2}} if dtype == "fp16" else {}
    _, whole = train(make_engine(dtype=dtype, **fp16), None, options(6))
    train(make_engine(dtype=dtype, **fp16), tmp_path, options(6, exit_interval=3))
    _, rest = train(make_engine(dtype=dtype, **fp16), tmp_path, options(6), resume=True)
    assert [s.loss for s in rest.steps] == [s.loss for s in whole.steps[3:]]


def test_a_finished_run_is_not_saved_again(tmp_path: Path) -> None:
    train(make_engine(), tmp_path, options(3))
    stamp = (tmp_path / "global_step3" / "manifest.json").stat().st_mtime_ns
    _run, recorder = train(make_engine(), tmp_path, options(3), resume=True)
    assert recorder.steps == []
    assert (tmp_path / "global_step3" / "manifest.json").stat().st_mtime_ns == stamp


def _failing(engine: Any, at: int, result: StepResult) -> Any:
    real, calls = engine.train_step, []

    def train_step(batches: Any, lr: float) -> StepResult:
        calls.append(lr)
        true = real(batches, lr)
        return result if len(calls) >= at else true

    engine.train_step = train_step
    return engine


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (StepResult(float("nan"), 1.0), "step 4: the loss is nan"),
        (StepResult(torch.tensor(float("inf")), torch.tensor(1.0)), "step 4: the loss is inf"),
        (StepResult(2.0, float("inf")), "step 4: the gradient norm is inf"),
    ],
)
def test_bad_numbers_in_the_weights_stop_the_run(tmp_path: Path, result: StepResult, says: str) -> None:
    engine = _failing(make_engine(), 4, result)
    rule = SaveRule(factor=2, train_iters=20)
    with pytest.raises(TrainingError) as caught:
        train(engine, tmp_path, options(20, save_rule=rule))
    text = str(caught.value)
    assert says in text
    assert "samples 24 to 31" in text
    assert "24, 25, 26" in text
    assert "step 2" in text
    assert sorted(complete_steps(tmp_path)) == [2]
    train(make_engine(), tmp_path, options(4), resume=True)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, where: str) -> None:
    """Finite loss, finite norm, spoilt by the update itself: the good checkpoint stays, and the run ends with an error."""
    engine = make_engine()
    real, calls = engine.train_step, []

    def train_step(batches: Any, lr: float) -> StepResult:
        result = real(batches, lr)
        calls.append(lr)
        if len(calls) == 4:
            own = next(iter(engine.optimizer_slices().values()))
            (own.master if where == "weight" else own.moments["exp_avg_sq"])[3] = float("inf")
        return result

    engine.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="step 4: weights or optimizer state are not finite: model.embed_tokens.weight"):
        train(engine, tmp_path, options(20, save_rule=SaveRule(factor=2, train_iters=20)))
    assert sorted(complete_steps(tmp_path)) == [2]
    engine.train_step = real  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="not finite"):
        train(engine, None, options(1))


def test_skipped_steps_do_not_advance_the_schedule_and_have_a_limit(tmp_path: Path) -> None:
    engine = _failing(make_engine(), 2, StepResult(3.0, float("inf"), True))
    with pytest.raises(TrainingError, match="4 steps were skipped within 1000, 3 are allowed"):
        train(engine, None, options(20, guard=GuardOptions(budget=3)))
    engine = _failing(make_engine(), 2, StepResult(3.0, float("inf"), True))
    run, recorder = train(engine, None, options(4))
    assert run.state.skipped_iterations == 3
    assert len({s.learning_rate for s in recorder.steps[1:]}) == 1


def test_on_end_is_heard_after_an_error_and_in_reverse(tmp_path: Path) -> None:
    heard: list[str] = []

    class Named(Hook):
        def __init__(self, name: str, fails: bool = False) -> None:
            self.name, self.fails = name, fails

        def on_end(self, run: Run, outcome: str) -> None:
            heard.append(f"{self.name}: {outcome}")
            if self.fails:
                raise RuntimeError("in on_end")

    engine = _failing(make_engine(), 1, StepResult(float("nan"), 1.0))
    with pytest.raises(TrainingError):
        train(engine, None, options(2), hooks=[Named("a"), Named("b", fails=True)])
    assert heard == ["b: failed: step 1: the loss is nan", "a: failed: step 1: the loss is nan"]


def test_metrics_after_a_resume_have_each_step_once(tmp_path: Path) -> None:
    file, save = tmp_path / "metrics.jsonl", tmp_path / "save"
    _, whole = train(make_engine(), None, options(9))
    rule = SaveRule(factor=3, train_iters=9)
    train(make_engine(), save, options(9, save_rule=rule, exit_interval=5), metrics=file)
    (save / "latest").write_text("global_step3")
    train(make_engine(), save, options(9, save_rule=rule, eval_interval=3), resume=True, metrics=file)
    rows = read_rows(file)
    assert [row["iteration"] for row in rows] == list(range(1, 10))
    assert [row["train/lm_loss"] for row in rows] == [s.loss for s in whole.steps]
    assert [row["iteration"] for row in rows if "validation/lm_loss" in row] == [6, 9]
    assert all(json.loads(line) for line in file.read_text().splitlines())
    wanted = "train/learning_rate train/grad_norm train/tokens runtime/samples_per_sec runtime/iteration_time "
    wanted += "runtime/tokens_per_sec runtime/flops_per_sec_per_gpu runtime/model_flops_utilization runtime/data_wait "
    wanted += "runtime/max_memory_gib wall_time"
    assert set(wanted.split()) <= set(rows[0])
    assert rows[-1]["validation/lm_loss_ppl"] == pytest.approx(2.718281828 ** rows[-1]["validation/lm_loss"])


def test_state_ignores_what_it_does_not_know() -> None:
    state = TrainState(3, 1, 24, 384, 2.5, 2)
    assert TrainState.from_dict({**state.to_dict(), "of_a_later_release": 1}) == state
    assert state.applied_iterations == 2
