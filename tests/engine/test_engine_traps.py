"""Each trap of DeepSpeed 0.19.8 on this kind of machine (spec/environment.md 2), and what holds it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.engine.base import EngineSettings
from megatron.parallel.mesh import set_default_timeout
from tests.engine.engine_cases import for_step, make_engine, micro_batches, model_config
from tests.parallel.ranks import RankError, run_ranks

ROOT = Path(__file__).parents[2]
SETTINGS = EngineSettings(gradient_accumulation=2, zero_stage=1)


def _inside() -> dict[str, Any]:
    import deepspeed
    import torch

    engine = make_engine(1, 2, "deepspeed", SETTINGS, model_config())
    engine.train_step(for_step(engine, micro_batches(engine.mesh)), 1e-3)
    inner = engine._engine
    return {
        "shm": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],
        "optimizer": isinstance(inner.basic_optimizer, torch.optim.AdamW),
        "reentrant": inner._config.pipeline["use_reentrant"],
        "partitioned": (inner.is_pipe_partitioned, inner.is_grad_partitioned),
        "stage": inner.zero_optimization_stage(),
        "flags": {
            name: bool(p.model_parallel and p.tensor_model_parallel) == (engine.specs[name].cut != "replicated")
            for name, p in engine.parameters().items()
        },
        "timeouts": {dist.distributed_c10d._get_pg_config(g)["pg_name"]: t for g, t in group_timeouts().items()},
    }


def group_timeouts() -> dict[Any, timedelta]:
    """Timeout of every group this rank is in."""
    groups = [g for g in dist.distributed_c10d._world.pg_map if g is not None]
    return {g: g._get_backend(next(iter(g._device_types))).options._timeout for g in groups}


def test_settings_reach_deepspeed() -> None:
    for got in run_ranks(_inside, 2, timeout=41.0):
        assert got["shm"] is False, "the shared-memory op would compile C++ for a minute"
        assert got["optimizer"], "DeepSpeed's own Adam would compile C++ for minutes"
        assert got["reentrant"] is False
        assert got["partitioned"] == (False, False)
        assert got["stage"] == 1
        assert all(got["flags"].values())


def _timeouts() -> list[float]:
    engine = make_engine(2, 1, "deepspeed", EngineSettings(timeout_s=41.0), model_config())
    assert engine.mesh.pp_group is not None
    return [t.total_seconds() for t in group_timeouts().values()]


def test_every_group_has_our_time_out() -> None:
    for seconds in run_ranks(_timeouts, 2, timeout=41.0):
        assert len(seconds) >= 5
        assert set(seconds) == {41.0}


def _half_stops() -> None:
    set_default_timeout(4.0)  # as a run does before it makes its mesh, whose groups count tokens
    engine = make_engine(1, 1, "deepspeed", EngineSettings(timeout_s=4.0, zero_stage=1), model_config())
    batches = micro_batches(engine.mesh)
    engine.train_step(for_step(engine, batches), 1e-3)
    if dist.get_rank() == 1:
        time.sleep(25)
    engine.train_step(for_step(engine, batches), 1e-3)


@pytest.mark.slow
def test_a_stuck_rank_ends_the_others_in_a_sub_group() -> None:
    """Data-parallel collectives run in a group that DeepSpeed makes; without our timeout it would wait 30 minutes."""
    begin = time.monotonic()
    with pytest.raises(RankError, match="imed out|timeout|Timeout"):
        run_ranks(_half_stops, 2, timeout=40)
    assert time.monotonic() - begin < 30


def _quietness(folder: str) -> None:
    engine = make_engine(2, 1, "deepspeed", SETTINGS, model_config())
    engine.train_step(for_step(engine, micro_batches(engine.mesh)), 1e-3)
    sys.stdout.flush()
    sys.stderr.flush()
    Path(folder, f"{dist.get_rank()}.txt").write_bytes(Path("/proc/self/fd/2").read_bytes())


def test_a_run_prints_nothing_of_its_own(tmp_path: Path) -> None:
    run_ranks(_quietness, 2, str(tmp_path))
    said = "".join(p.read_text() for p in tmp_path.glob("*.txt"))
    lines = [line for line in said.splitlines() if line.strip() and "[Gloo]" not in line]
    assert not lines, lines


@pytest.mark.slow
def test_no_compiler_is_imported_and_start_is_quick() -> None:
    """torch._dynamo costs seconds per process, and DeepSpeed's look at its ops starts a C compiler."""
    code = (
        "import subprocess\n"
        "def no_child(*a, **k): raise AssertionError(f'a program is started: {a}')\n"
        "subprocess.Popen.__init__ = no_child\n"
        "import sys, os; from tests.engine.engine_cases import *; from megatron.engine.base import EngineSettings\n"
        "for kind in ('single', 'deepspeed'):\n"
        "    e = make_engine(1, 1, kind, EngineSettings(gradient_accumulation=2, dtype='bf16'), model_config())\n"
        "    e.train_step(for_step(e, micro_batches(e.mesh)), 1e-3)\n"
        "    assert 'torch._dynamo' not in sys.modules, kind\n"
        "assert 'deepspeed' in sys.modules\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_single_engine_does_not_import_deepspeed() -> None:
    code = "import sys, megatron.engine.build; assert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
