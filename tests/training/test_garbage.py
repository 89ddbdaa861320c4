"""The collector of a long run looks at the run's own objects only."""

from __future__ import annotations

import gc
import linecache
import threading

import pytest

from megatron.reliability.watchdog import describe_stack
from megatron.training.garbage import settled
from tests.training.runs import Recorder, make_engine, options, train


@pytest.fixture(autouse=True)
def nothing_set_apart() -> None:
    """`tests/conftest.py` freezes what the imports made."""
    gc.unfreeze()


def test_what_was_there_before_is_set_apart_for_the_time_of_a_training() -> None:
    before = gc.get_freeze_count()
    inside = 0

    def fail() -> None:
        nonlocal inside
        with settled():
            inside = gc.get_freeze_count()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside > before + 10_000 and gc.get_freeze_count() <= before


@pytest.mark.slow
def test_a_training_settles_and_leaves_nothing_behind() -> None:
    seen: list[int] = []

    class Watch(Recorder):
        def on_step(self, run, step) -> None:  # type: ignore[no-untyped-def]
            seen.append(gc.get_freeze_count())

    train(make_engine(), None, options(train_iters=2), hooks=[Watch()])
    assert len(seen) == 2 and min(seen) > 10_000 and gc.get_freeze_count() < 10_000


def test_a_stack_is_described_without_keeping_sources() -> None:
    """The watchdog does it with every beat: the text of each file that ever stood on the stack would stay in memory."""
    linecache.clearcache()
    said = describe_stack(threading.get_ident())
    assert said[0].startswith("watchdog.py:") and said[1].endswith(" test_a_stack_is_described_without_keeping_sources")
    assert len(said) == 12 and not linecache.cache
