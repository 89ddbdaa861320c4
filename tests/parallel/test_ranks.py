"""The harness itself: results come back in order, failures show every rank's log, a hang ends at the time limit."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import RankError, run_ranks


def _sum(value: int) -> tuple[int, float]:
    x = torch.tensor([float(value + dist.get_rank())])
    dist.all_reduce(x)
    return dist.get_rank(), x.item()


def _fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one says no")
    time.sleep(60)


def _die() -> None:
    os._exit(7)


def test_results_in_rank_order() -> None:
    assert run_ranks(_sum, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


@pytest.mark.slow
def test_a_failure_shows_its_log_and_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank one says no"):
        run_ranks(_fail_on_one, 2, connect=False)
    assert time.monotonic() - start < 20


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RankError, match="exit code 7"):
        run_ranks(_die, 1, connect=False)


@pytest.mark.slow
def test_a_hang_ends_at_the_limit_with_a_stack() -> None:
    with pytest.raises(RankError, match=r"time limit(.|\n)*time_sleep_here"):
        run_ranks(time_sleep_here, 1, connect=False, timeout=1)


def time_sleep_here() -> None:
    time.sleep(100)


def test_pytest_itself_has_no_deepspeed() -> None:
    assert not dist.is_initialized()
    assert "RANK" not in os.environ or "torchrun" in sys.argv[0]
