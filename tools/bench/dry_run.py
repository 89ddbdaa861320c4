"""Accuracy of `--dry-run`: predicted and measured peak memory of a training step, for many configurations.

    python tools/bench/dry_run.py [--only NAME ...] [--output benchmarks/results/dry-run-memory.json]

Measured is the largest resident set of a process during three steps, less what it was after one step of a tiny model
(interpreter, libraries, caches of the math library). Each configuration runs in a process of its own, several ranks in
several; the fullest rank counts. glibc is told to give freed memory back at once, so that the resident set is what is alive;
in training it is told to keep it
(`engine/cpu.py`), and the resident set only ever grows.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.data.micro_batch import MicroBatch
from megatron.engine import startup
from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.files import write_json
from megatron.launch.environment import init_process_group, read_rank_environment
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.planning.memory import rank_memory
from megatron.training.micro_batches import take_micro_batches

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A configuration; world = pp x dp x tp processes."""

    name: str
    model: ModelConfig
    settings: EngineSettings
    pp: int = 1
    dp: int = 1
    tp: int = 1
    kind: str = "auto"

    @property
    def world(self) -> int:
        """Processes."""
        return self.pp * self.dp * self.tp

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs it."""
        return self.world > 1 or self.kind == "deepspeed"


def _model(mixer: str, layers: int = 4, hidden: int = 384, vocab: int = 4096, **more: Any) -> ModelConfig:
    return ModelConfig(vocab, hidden, layers, 4, 2 * hidden, (mixer,) * layers, **more)


def cases() -> list[Case]:
    """All configurations: mixers, lengths, precisions, recomputation, accumulation, large vocabularies, and meshes."""
    base = EngineSettings(micro_batch=4, seq_length=512, lr=1e-4)
    bf16, deep = replace(base, dtype="bf16"), replace(base, gradient_accumulation=2)
    short = replace(base, micro_batch=2)
    recompute = replace(base, activation_checkpoint_interval=1)
    metala = _model("metala")
    all_cases = [Case(f"{m}", _model(m), base) for m in ("metala", "based", "base_conv", "sliding", "global", "alibi", "jrt")]
    all_cases += [Case("mamba", _model("mamba", layers=2), short)]
    all_cases += [Case(f"{m} recomputed", _model(m), recompute) for m in ("metala", "based", "global")]
    all_cases += [
        Case("metala recomputed, two blocks a piece", metala, replace(base, activation_checkpoint_interval=2)),
        Case("metala bf16", metala, bf16),
        Case("metala bf16, accumulation 2", metala, replace(bf16, gradient_accumulation=2)),
        Case("metala accumulation 2", metala, deep),
        Case("metala 2,048 tokens", metala, replace(base, micro_batch=1, seq_length=2048)),
        Case("metala wide", _model("metala", layers=2, hidden=1024), replace(base, micro_batch=1)),
        Case("metala many weights, few tokens", _model("metala", 3, 1024), replace(base, micro_batch=1, seq_length=64)),
        Case("metala large vocabulary", _model("metala", layers=2, vocab=32768), short),
        Case("metala tied", _model("metala", tie_embeddings=True, vocab=32768, layers=1), short),
        Case("metala DeepSpeed, one rank", metala, base, kind="deepspeed"),
        Case("metala DP 2, ZeRO-1", _model("metala", hidden=768, layers=2), short, dp=2),
        Case("metala DP 2, ZeRO-1, bf16", _model("metala", hidden=768, layers=2), replace(short, dtype="bf16"), dp=2),
        Case(
            "metala DP 2, ZeRO-1, many weights, few tokens",
            _model("metala", 3, 1024),
            replace(base, micro_batch=1, seq_length=64),
            dp=2,
        ),
        Case("metala TP 2", metala, base, tp=2),
        Case("metala PP 2", metala, deep, pp=2),
        Case("metala PP 2, recomputed", metala, replace(deep, activation_checkpoint_interval=1), pp=2),
        Case(
            "metala PP 2, large vocabulary",
            _model("metala", layers=2, vocab=32768),
            replace(short, gradient_accumulation=2),
            pp=2,
        ),
        Case("metala PP 2, bf16", metala, replace(bf16, gradient_accumulation=2), pp=2),
        Case("based TP 2, recomputed", _model("based"), recompute, tp=2),
        Case("metala DP 2, ZeRO-2", _model("metala", hidden=768, layers=2), replace(short, zero_stage=2), dp=2),
        Case("metala DP 2, ZeRO-3", _model("metala", hidden=768, layers=2), replace(short, zero_stage=3), dp=2),
    ]
    return all_cases


def _batches(settings: EngineSettings, vocab: int) -> Iterator[MicroBatch]:
    shape = (settings.micro_batch, settings.seq_length)
    while True:
        tokens = torch.randint(0, vocab, shape)
        yield MicroBatch(tokens, tokens.clone(), torch.ones(shape))


def _status(name: str) -> int:
    """A size of this process in bytes, by its name in /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _give_memory_back() -> None:
    """Every large block is mapped for itself and unmapped when it is freed."""
    torch.set_flush_denormal(True)
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, 4096)
    mallopt(_M_TRIM_THRESHOLD, 64 * 1024)


def measure(case: Case) -> int:
    """Peak of the resident set in three steps, in bytes above that of a tiny model (in a rank of its own)."""
    vars(startup)["tune_cpu"] = _give_memory_back
    env = read_rank_environment()
    init_process_group(env, timeout_s=120)
    mesh = Mesh.create(case.pp, case.tp, env.world_size, env.rank)
    tiny = replace(case.model, hidden_size=64, mlp_width=64, vocab_size=64)
    for model, settings in ((tiny, replace(case.settings, micro_batch=1, seq_length=64)), (case.model, case.settings)):
        if model is case.model:
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the largest resident set so far
        engine = build_engine(case.kind, model, mesh, settings, env.local_rank)
        batches = _batches(settings, model.vocab_size)
        for _ in range(3 if model is case.model else 1):
            engine.train_step(take_micro_batches(batches, engine.gradient_accumulation), 1e-4)
        if model is not case.model:
            engine.close()
            del engine
    return _status("VmHWM") - before


def _rank(case: Case, rank: int, port: int, pipe: int) -> None:
    """In a forked child: be a rank, write the result, end."""
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.world), LOCAL_WORLD_SIZE=str(case.world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.write(pipe, json.dumps(measure(case)).encode() + b"\n")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_case(case: Case) -> dict[str, Any]:
    """Predict and measure one configuration."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reader, writer = os.pipe()
    pids = []
    for rank in range(case.world):
        pid = os.fork()
        if not pid:
            _rank(case, rank, port, writer)
        pids.append(pid)
    os.close(writer)
    prints = [
        rank_memory(
            case.model, Mesh.shape_only(case.pp, case.tp, case.world, rank), case.settings, case.deepspeed, resident=True
        )
        for rank in sorted({0, case.world - 1})
    ]
    with os.fdopen(reader, "rb") as results:
        sizes = [json.loads(line) for line in results]
    for pid in pids:
        os.waitpid(pid, 0)
    if len(sizes) < case.world:
        raise RuntimeError(f"{case.name}: a rank failed")
    estimate = max(prints, key=lambda p: p.total)
    measured = max(sizes)
    return {
        "name": case.name,
        "predicted_mib": round(estimate.total / _MIB, 1),
        "measured_mib": round(measured / _MIB, 1),
        "error": round(estimate.total / measured - 1, 4),
        "parts_mib": {k: round(v / _MIB, 1) for k, v in vars(estimate).items() if k not in ("parameters", "total")},
    }


def main() -> int:
    """Run all; the exit code is 1 when a prediction is off by more than a tenth."""
    parser = argparse.ArgumentParser(description="Predicted memory against the measured peak.")
    parser.add_argument("--only", nargs="*", default=[], help="names of configurations")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("megatron.engine.deepspeed_zero")  # DeepSpeed, once for all forks
    rows = []
    for case in cases():
        if not arguments.only or case.name in arguments.only:
            rows.append(run_case(case))
            row = rows[-1]
            print(f"{row['name']:42} {row['predicted_mib']:8.1f} {row['measured_mib']:8.1f} {row['error']:+.1%}", flush=True)
    worst = max(abs(row["error"]) for row in rows)
    print(f"{len(rows)} configurations, worst {worst:.1%}")
    if arguments.output:
        write_json(arguments.output, {"machine": platform.machine(), "torch": torch.__version__, "worst": worst, "cases": rows})
    return int(worst > 0.1)


if __name__ == "__main__":
    raise SystemExit(main())
