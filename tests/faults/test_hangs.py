"""Hung and lost ranks: who is named, when, and that a healthy run never is."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.reliability.consensus import Consensus
from megatron.reliability.heartbeat import IN_COLLECTIVE, START_FACTOR, Heartbeat, Membership
from megatron.reliability.watchdog import EXIT_HANG, LostRank, Watchdog

ROOT = Path(__file__).parents[2]
T = 30.0


def real_ranks(trials: int, faults: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.hangs_count", "--trials", str(trials), "--faults", faults],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["named and left in time"] == trials


@pytest.mark.slow
def test_faults_on_real_ranks_are_named_in_time() -> None:
    """The slow suite adds loops and errors in the data."""
    real_ranks(3, "stop,kill,loop")


def beat(rank: int, moves: int = 10, still_s: float = 0.0, phase: str = "step", settled: bool = True) -> Heartbeat:
    stack = ("loop.py:120 step", "loop.py:70 fit")
    return Heartbeat(rank, phase, moves, still_s, moves // 3, settled, stack, "hosta", 100 + rank)


@pytest.mark.slow
def test_no_false_alarm_in_ten_thousand_steps_with_a_long_compile() -> None:
    """A fake clock: ten minutes until the first step is done with a timeout of one, then steps of up to 0.9 timeouts."""
    timeout, now = 61.0, 0.0
    rolls = [Membership(timeout, 3) for _ in range(3)]
    moves, since = 0, 0.0
    for tick in range(10_000):
        now += timeout / 8
        compiling = now < 600
        if not compiling and (tick % 7 == 0 or moves == 0):
            moves, since = moves + 1, now
        for roll in rolls:
            for rank in range(3):
                roll.hear(beat(rank, moves, now - since, settled=not compiling), now)
        assert all(roll.alarm(now) is None for roll in rolls), now
    assert moves > 1400
    assert START_FACTOR * timeout >= 600


def test_the_silent_rank_is_named_although_the_others_stand_longer() -> None:
    roll = Membership(T, 3)
    for tick in range(9):
        for rank in range(3):
            if rank != 2 or tick == 0:
                roll.hear(beat(rank, 11 if rank != 2 else 10, 4.0 * tick, f"step, {IN_COLLECTIVE} all_reduce"), 4.0 * tick)
    alarm = roll.alarm(32.1)
    assert alarm is not None
    assert alarm.lost
    assert alarm.culprits == (2,)
    assert "lost: rank 2" in alarm.text
    assert "rank 2 (hosta pid 102): phase 'step, in the collective all_reduce' of step 3" in alarm.text
    assert "loop.py:120 step" in alarm.text
    assert alarm.text.count("loop.py:120 step") == 1, "the stack of the culprit only"


def test_the_rank_that_moved_least_is_named() -> None:
    roll = Membership(T, 4)
    for rank in range(4):
        roll.hear(beat(rank, 9 if rank == 1 else 10, T + 1), 100.0)
    alarm = roll.alarm(100.0)
    assert alarm is not None
    assert (alarm.lost, alarm.culprits) == (False, (1,))


def test_of_equal_ranks_the_one_outside_a_collective_is_named() -> None:
    roll = Membership(T, 3)
    for rank in range(3):
        phase = "forward/backward" if rank == 0 else f"forward/backward, {IN_COLLECTIVE} recv"
        roll.hear(beat(rank, 10, T + 1, phase), 100.0)
    alarm = roll.alarm(100.0)
    assert alarm is not None
    assert alarm.culprits == (0,)


def test_who_left_well_is_no_culprit_and_who_left_badly_is_at_once() -> None:
    roll = Membership(T, 3)
    for rank in range(3):
        roll.hear(beat(rank), 0.0)
    roll.hear(replace(beat(1), ended="finished"), 1.0)
    for now in (10.0, 20.0, 29.0):
        roll.hear(beat(0, int(now)), now)
        roll.hear(beat(2, int(now)), now)
        assert roll.alarm(now) is None
    roll.hear(replace(beat(2), ended="DataError: sample 77 is damaged", code=3), 29.5)
    alarm = roll.alarm(29.6)
    assert alarm is not None
    assert alarm.culprits == (2,)
    assert "sample 77 is damaged (exit code 3)" in alarm.text
    assert "never heard of" not in alarm.text


def test_who_left_because_of_another_is_no_culprit_and_its_words_are_taken_over() -> None:
    roll = Membership(T, 3)
    for rank in range(3):
        roll.hear(beat(rank), 0.0)
    roll.hear(replace(beat(1), ended="rank 0 is lost", code=22), 1.0)
    assert roll.alarm(1.0) is None
    assert roll.missing(1.0, T) == []
    roll.hear(replace(beat(1), ended="another rank hangs", code=21, report="stuck: rank 0\n..."), 2.0)
    alarm = roll.alarm(2.0)
    assert alarm is not None
    assert (alarm.lost, alarm.text) == (False, "stuck: rank 0\n...")


def test_datagrams_that_overtake_each_other_or_come_from_elsewhere() -> None:
    roll = Membership(T, 2)
    roll.hear(beat(1, 10), 5.0)
    roll.hear(beat(1, 9), 6.0)
    assert roll.facts()[1].moves == 10
    data = beat(1).encode("abc")
    assert Heartbeat.decode(data, "abc") == beat(1)
    assert Heartbeat.decode(data, "other job") is None
    for junk in (b"", b"\xff\x00", b"[]", b"{}", b'{"job": "abc"}', b'{"job": "abc", "stack": 3, "rank": 1}'):
        assert Heartbeat.decode(junk, "abc") is None


@pytest.mark.slow
def test_one_process_that_stands_still_is_found_and_leaves() -> None:
    left = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    watchdog = Watchdog.open(0.4, 0, Consensus(), leave)
    watchdog.settle()
    for _ in range(10):
        watchdog.move("step", 7)
        time.sleep(0.1)
    assert not left.is_set()
    begin = time.monotonic()
    watchdog.move("data", 8)
    assert left.wait(5)
    assert time.monotonic() - begin < 2 * 0.4 + 0.3
    assert codes == [EXIT_HANG]
    watchdog.close()


def test_a_closed_watchdog_is_silent() -> None:
    codes: list[int] = []
    watchdog = Watchdog.open(0.2, 0, Consensus(), codes.append)
    watchdog.settle()
    watchdog.close()
    time.sleep(0.6)
    assert codes == []
    assert watchdog.unheard() == []


def test_a_broken_collective_without_a_missing_rank_is_not_explained() -> None:
    watchdog = Watchdog.open(0.2, 0, Consensus())
    assert watchdog.explain(RuntimeError("a defect of ours")) is None
    watchdog.close()
    assert LostRank("x").exit_code == 22


@pytest.mark.slow
def test_faults_in_the_data_are_named_in_time() -> None:
    real_ranks(2, "data loop,data error")
