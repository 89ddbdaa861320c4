"""What all tests share: paths, golden data, a tiny corpus, and few threads so that parallel ranks do not fight."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.quick_interpreter import quicken

_SLOW = 50  # a slow test takes about as long as so many others
_unfreeze = gc.unfreeze
_unfrozen: list[bool] = []
"""Not empty when a test has called gc.unfreeze(); gc.get_freeze_count() would count a million objects, test by test."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: kernels run on the CPU, slowly

with contextlib.suppress(ImportError):  # a GPU machine that runs the `gpu` tests alone need not have it
    from hypothesis import settings

    # Property tests draw the same examples each time: what was green stays green. HYPOTHESIS_PROFILE=random looks further.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("random", deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no core waits at the end for one of them; within a file nothing moves."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += _SLOW if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Garbage collections of the tests pass over what the imports made, a million objects: many libraries ask for full ones."""

    def unfreeze() -> None:
        _unfreeze()
        _unfrozen.append(True)

    gc.collect()
    gc.freeze()
    gc.unfreeze = unfreeze


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines: how many tests were skipped, reason by reason."""
    reasons = Counter(
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} tests skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5}  {reason}")


@pytest.fixture(scope="session")
def golden_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of files that the official GPT-NeoX code produced."""
    from tests.golden.store import unpack  # torch is loaded where a test asks for golden files only

    return unpack("neox", tmp_path_factory.mktemp("golden"))


@pytest.fixture(autouse=True)
def _broken_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that breaks the CUDA context would fail every later test of its process: end it, xdist starts another."""
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and request.node.get_closest_marker("gpu") and "torch" in sys.modules:
        try:
            sys.modules["torch"].cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def _quick_interpreter() -> None:
    """Kernels that run on the CPU: what the interpreter does again at each call of a kernel it does once."""
    if "triton.runtime.interpreter" in sys.modules:
        quicken()


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Commands run inside the test process flush denormals for speed; the next test starts with IEEE arithmetic again."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _frozen() -> Iterator[None]:
    """A training in the test process ends with `gc.unfreeze()`: what was set apart after collection is set apart again."""
    yield
    if _unfrozen:
        _unfrozen.clear()
        gc.freeze()
