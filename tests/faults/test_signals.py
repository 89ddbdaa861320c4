"""Signals and time limits: all ranks leave at one step, saved, with code 75; a second signal leaves at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.layout import complete_steps
from megatron.errors import ConfigError
from megatron.reliability.signals import ECHO_S, StopSignals, TimeLimit, seconds_of, signal_numbers
from megatron.reliability.stop import EXIT_SAVED, EXIT_UNSAVED, Control
from megatron.training.hooks import Hook, Run, Step
from megatron.training.intervals import SaveRule
from tests.training.runs import make_engine, micros, options, train

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_random_moments_on_real_ranks() -> None:
    """Two of the hundred trials that the command runs by default."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.signals_count", "--trials", "2", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["agreed saves with code 75"] == 2


class _Kill(Hook):
    """Sends this process a signal after a step, and waits until it has been noticed."""

    def __init__(self, step: int, number: int, signals: StopSignals) -> None:
        self.step, self.number, self.signals = step, number, signals

    def on_step(self, run: Run, step: Step) -> None:
        if step.iteration == self.step:
            os.kill(os.getpid(), self.number)
            while not self.signals.received:
                time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_process_saves_and_leaves(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    signals = StopSignals(signal_numbers(["SIGTERM", "USR1", "2"])).start()
    control = Control(signals=signals)
    rule = SaveRule(factor=5, train_iters=20)
    hooks = [_Kill(3, number, signals)]
    run, recorder = train(make_engine(), tmp_path, options(20, save_rule=rule), hooks=hooks, control=control)
    control.close()
    assert (run.exit_code, run.stop, run.state.iteration) == (EXIT_SAVED, signal.Signals(number).name, 3)
    assert sorted(complete_steps(tmp_path)) == [3]
    assert recorder.heard[-1] == f"stopped: {signal.Signals(number).name}"
    assert signal.getsignal(signal.SIGINT) is before, "the handlers before are back"
    whole, rest = train(make_engine(), None, options(5)), train(make_engine(), tmp_path, options(5), resume=True)
    assert [s.loss for s in rest[1].steps] == [s.loss for s in whole[1].steps[3:]]


def test_a_run_without_a_save_folder_says_so_by_its_code() -> None:
    signals = StopSignals(signal_numbers(["SIGTERM"])).start()
    control = Control(signals=signals)
    run, _ = train(make_engine(), None, options(20), hooks=[_Kill(2, signal.SIGTERM, signals)], control=control)
    control.close()
    assert (run.exit_code, run.state.iteration) == (EXIT_UNSAVED, 2)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    signals = StopSignals(signal_numbers(["SIGTERM"]))
    signals.note(signal.SIGTERM)
    run, recorder = train(make_engine(), tmp_path, options(20), control=Control(signals=signals))
    assert (run.exit_code, run.state.iteration, recorder.steps) == (EXIT_SAVED, 0, [])
    assert not complete_steps(tmp_path)


def test_a_signal_while_waiting_for_data_leaves_without_the_data(tmp_path: Path) -> None:
    """The tenth micro batch never comes."""
    signals = StopSignals(signal_numbers(["SIGTERM"]))

    def stalled(mesh: Any, start: int) -> Any:
        for number, batch in enumerate(micros(mesh, start)):
            if number == 9:
                signals.note(signal.SIGTERM)
                time.sleep(3600)
            yield batch

    begin = time.monotonic()
    control = Control(signals=signals, poll_s=0.05)
    run, _ = train(make_engine(), tmp_path, options(20), control=control, data=stalled)
    assert time.monotonic() - begin < 20
    assert (run.exit_code, run.state.iteration, run.state.consumed_samples) == (EXIT_SAVED, 4, 32)
    assert sorted(complete_steps(tmp_path)) == [4]


def test_a_signal_during_an_evaluation_gives_it_up(tmp_path: Path) -> None:
    signals = StopSignals(signal_numbers(["SIGTERM"]))
    control = Control(signals=signals)
    engine = make_engine()
    real = engine.eval_loss

    def eval_loss(micro_batches: Any) -> Any:
        signals.note(signal.SIGTERM)
        return real(micro_batches)

    engine.eval_loss = eval_loss  # type: ignore[method-assign]
    long = options(20, eval_interval=2)
    from megatron.training.evaluate import Evaluator

    evaluator = Evaluator(engine, lambda: micros(engine.mesh, 500), 50, stop_asked=control.stop_asked)
    assert evaluator() is None, "the rest of 100 micro batches is left out"
    run, recorder = train(engine, tmp_path, long, control=control)
    assert run.exit_code == EXIT_SAVED
    assert not [word for word in recorder.heard if word.startswith("validation")]


def test_time_limit_leaves_room_for_a_step_and_a_save() -> None:
    now = [0.0]
    limit = TimeLimit(100.0, lambda: now[0])
    now[0] = 99.0
    assert not limit.is_up()
    limit.took(step_s=2.0, save_s=10.0)
    now[0] = 80.9
    assert not limit.is_up()
    now[0] = 81.0
    assert limit.is_up()
    assert not TimeLimit(None, lambda: 1e9).is_up()


@pytest.mark.slow
def test_time_limit_ends_a_run(tmp_path: Path) -> None:
    now = [0.0]

    class Clock(Hook):
        def on_step(self, run: Run, step: Step) -> None:
            now[0] += 10.0

    control = Control(limit=TimeLimit(39.5, lambda: now[0]))
    run, _ = train(make_engine(), tmp_path, options(20), hooks=[Clock()], control=control)
    assert (run.exit_code, run.stop, run.state.iteration) == (EXIT_SAVED, "time_limit", 4)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3:50:00", 13800.0), ("45:00", 2700.0), ("90", 90.0), (13800, 13800.0), ("1-06:00:00", 108000.0), (None, None)],
)
def test_times(text: Any, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0", "1:2:3:4", "-5", ""])
def test_no_times(text: str) -> None:
    with pytest.raises(ConfigError, match="time_limit"):
        seconds_of(text)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGNONSENSE", "9", "0", "4711"])
def test_signals_that_nobody_can_catch(name: str) -> None:
    with pytest.raises(ConfigError, match="exit_signals"):
        signal_numbers([name])


def test_an_echo_is_no_second_signal_but_a_later_one_is() -> None:
    """A terminal sends Ctrl-C to every process of the job, and a launcher passes its own on."""
    left: list[int] = []
    now = [5.0]
    signals = StopSignals(signal_numbers(["SIGTERM", "SIGINT"]), leave=left.append, clock=lambda: now[0])
    signals.note(signal.SIGINT)
    now[0] += ECHO_S * 0.9
    signals.note(signal.SIGTERM)
    assert (signals.received, left) == (signal.SIGINT, [])
    now[0] += ECHO_S
    signals.note(signal.SIGHUP)
    assert left == [], "a signal that is not listed is none of ours"
    signals.note(signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_sits_in_c_code() -> None:
    code = (
        "import ctypes, sys\n"
        "from megatron.reliability.signals import StopSignals, signal_numbers\n"
        "StopSignals(signal_numbers(['SIGTERM'])).start()\n"
        "print('ready', flush=True)\n"
        "lock = ctypes.create_string_buffer(64)\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(ECHO_S + 0.3)
    assert child.poll() is None, "the first one is only remembered"
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 128 + signal.SIGTERM
    assert child.stderr is not None
    said = child.stderr.read().decode()
    assert "SIGTERM received" in said
    assert "leaving at once" in said
