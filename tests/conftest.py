"""What all tests share: paths, golden data, a tiny corpus, and few threads so that parallel ranks do not fight."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest

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


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Commands run inside the test process flush denormals for speed; the next test starts with IEEE arithmetic again."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)
