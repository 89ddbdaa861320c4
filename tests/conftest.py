"""What all tests share: paths, golden data, a tiny corpus, and few threads so that parallel ranks do not fight."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: kernels run on the CPU, slowly


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Commands run inside the test process flush denormals for speed; the next test starts with IEEE arithmetic again."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)
