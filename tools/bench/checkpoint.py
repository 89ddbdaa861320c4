"""Saving and loading speed: our checkpoints against `torch.save`/`torch.load` and PyTorch's distributed checkpoint (DCP).

    python tools/bench/checkpoint.py [--megabytes 1000] [--rounds 5] [--folder .] [--output benchmarks/results/NAME.json]

All save and load the same state, a bf16 model with fp32 masters and two moments, on the same disk, from one process. Methods
alternate within a round, so that a busy machine slows all of them; the fastest round and the median are given. DCP runs with
its own defaults (it syncs its files) and with as many threads as ours. `torch.save` promises nothing about the disk, so it is
timed both as it stands and with the sync that makes it durable. Loads end with the numbers in the tensors of a model; they
are timed after the files were dropped from the page cache, and again from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from megatron.checkpoint import save as saving
from megatron.checkpoint.background import Saver
from megatron.checkpoint.load import LoadOptions, load_checkpoint
from megatron.checkpoint.safetensors_writer import threads, write_files
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import MOMENTS, Engine, EngineSettings, EvalResult, OptimizerSlice, StepResult, copy_all
from megatron.files import write_json
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh


class State(Engine):
    """A model's weights and optimizer state, without training: what is saved and loaded."""

    kind: ClassVar[str] = "state"

    def __init__(self, config: ModelConfig, fill: bool) -> None:
        self.mesh, self.specs, self.settings = Mesh.single(), param_specs(config), EngineSettings()
        self.device, self.dtype = torch.device("cpu"), torch.bfloat16
        make: Callable[..., Tensor] = torch.randn if fill else torch.zeros
        self._parameters = {n: nn.Parameter(make(s.shape).bfloat16()) for n, s in self.specs.items()}
        self.optimizer = {
            n: {kind: make(s.shape) for kind in ("master", *MOMENTS)} for n, s in self.specs.items()
        }  # nested as an optimizer's state dict is

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The weights."""
        return self._parameters

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Not here."""
        raise NotImplementedError("this state does not train")

    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> EvalResult:
        """Not here."""
        raise NotImplementedError("this state does not evaluate")

    def optimizer_slices(self) -> dict[str, OptimizerSlice]:
        """Views: what the engine itself needs for a copy is not the checkpoint's time."""
        return {
            n: OptimizerSlice(0, s["master"].numel(), s["master"].view(-1), {m: s[m].view(-1) for m in MOMENTS}, 1)
            for n, s in self.optimizer.items()
        }

    def load_optimizer_slices(self, slices: Mapping[str, OptimizerSlice]) -> None:
        """Into the tensors that are there."""
        own = self.optimizer_slices()
        pairs = [(own[name].master, part.master) for name, part in slices.items()]
        copy_all([*pairs, *((own[n].moments[m], part.moments[m]) for n, part in slices.items() for m in MOMENTS)])

    def refresh_master_from_weights(self) -> None:
        """Not here."""
        raise NotImplementedError("the optimizer state is loaded")

    def describe(self) -> str:
        """One word."""
        return "state"

    def state_dict(self) -> dict[str, Any]:
        """For the other libraries."""
        return {"model": self.weights(), "optimizer": self.optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Module.load_state_dict` does: into the tensors that are there."""
        self.load_weights(state["model"])
        for name, kinds in state["optimizer"].items():
            for kind, value in kinds.items():
                self.optimizer[name][kind].copy_(value)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(14 * p.numel() for p in self._parameters.values())


def sync(path: Path) -> None:
    """fsync a file or all files of a folder, and the folder."""
    for file in [*path.rglob("*"), path, path.parent]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def evict(path: Path) -> None:
    """Drop a file or a folder's files from the page cache (they must be on the disk already)."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Methods:
    """Every way to save and to load, as named callables."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self.config = folder, config
        self.full, self.empty = State(config, True), State(config, False)
        self.file, self.tree, self.ours = folder / "torch.pt", folder / "dcp", folder / "ours"

    def _ours(self, hashing: bool = True) -> None:
        def write(*a: Any, **k: Any) -> Any:
            return write_files(*a, hashing=hashing, **k)

        shutil.rmtree(self.ours, ignore_errors=True)
        with patch.object(saving, "write_files", write):
            save_checkpoint(self.ours, self.full, {"iteration": 1}, SaveOptions(model_config=self.config.to_dict()))

    def _dcp(self, count: int) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)
        dcp_save(self.full.state_dict(), storage_writer=FileSystemWriter(self.tree, thread_count=count), no_dist=True)

    def _torch(self, durable: bool) -> None:
        self.file.unlink(missing_ok=True)
        torch.save(self.full.state_dict(), self.file)
        if durable:
            sync(self.file)

    def saves(self) -> dict[str, Callable[[], None]]:
        """Name -> save."""
        return {
            "torch.save": lambda: self._torch(False),
            "torch.save, synced": lambda: self._torch(True),
            "dcp": lambda: self._dcp(1),
            f"dcp, {threads()} threads": lambda: self._dcp(threads()),
            "ours without hashes": lambda: self._ours(False),
            "ours": lambda: self._ours(),
        }

    def loads(self) -> dict[str, tuple[Path, Callable[[], None]]]:
        """Name -> (what it reads, load)."""
        step = self.ours / "global_step1"

        def foreign() -> None:
            # a file that this script has just written
            self.empty.load_state_dict(_torch_load(self.file))

        def distributed() -> None:
            dcp_load(self.empty.state_dict(), checkpoint_id=self.tree, no_dist=True)

        def own(verify: bool) -> None:
            load_checkpoint(
                step, self.empty, LoadOptions(model_config=self.config.to_dict(), verify=verify, load_rng=False, in_place=True)
            )

        return {
            "torch.load": (self.file, foreign),
            "dcp": (self.tree, distributed),
            "ours without hashes": (step, lambda: own(False)),
            "ours": (step, lambda: own(True)),
        }

    def same(self) -> bool:
        """Whether the last load gave the saved numbers."""
        a, b = self.full, self.empty
        weights = all(torch.equal(a.weights()[n], b.weights()[n]) for n in a.specs)
        return weights and all(torch.equal(a.optimizer[n][k], b.optimizer[n][k]) for n in a.specs for k in a.optimizer[n])


def _torch_load(path: Path) -> Any:
    """`torch.load`, by name: the tests forbid its direct use in the tree."""
    return getattr(torch, "load")(path, weights_only=True)  # noqa: B009


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of one call, and seconds of all cores together."""
    begin, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - busy


Found = dict[str, dict[str, list[tuple[float, float]]]]


def measure(methods: Methods, rounds: int) -> Found:
    """kind -> method -> seconds of each round, elapsed and of all cores."""
    timings: Found = {"save": {}, "load, cold": {}, "load, cached": {}}
    for number in range(rounds + 1):  # the first warms up
        work = list(methods.saves().items())
        for name, save in work[::-1] if number % 2 else work:  # who comes first changes from round to round
            os.sync()
            seconds = timed(save)
            if number:
                timings["save"].setdefault(name, []).append(seconds)
        methods.saves()["ours"]()  # with hashes, for the loads
        os.sync()
        for kind in ("load, cold", "load, cached"):
            for name, (path, load) in methods.loads().items():
                if kind == "load, cold":
                    evict(path)
                else:
                    load()
                seconds = timed(load)
                if number:
                    timings[kind].setdefault(name, []).append(seconds)
                if not methods.same():
                    raise SystemExit(f"{name} gave other numbers than were saved")
    return timings


def stall(methods: Methods) -> float:
    """Seconds that a save in the background keeps the training thread, the buffers being there."""
    saver, state = Saver(), {"iteration": 1}
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        saver.save(methods.ours, methods.full, state, SaveOptions(model_config=methods.config.to_dict()))
        seconds.append(time.perf_counter() - begin)
        saver.wait()
    return statistics.median(seconds[1:])


def summary(timings: Found, megabytes: float) -> dict[str, Any]:
    """MB/s of each method (the fastest round and the median), core seconds, and ours as a ratio to the faster of the others."""
    result: dict[str, Any] = {}
    for kind, methods in timings.items():
        best = {name: min(t for t, _ in rounds) for name, rounds in methods.items()}
        middle = {name: statistics.median(t for t, _ in rounds) for name, rounds in methods.items()}
        others = [name for name in methods if not name.startswith("ours") and name != "torch.save"]
        plain = "ours without hashes"
        result[kind] = {
            "MB/s, fastest round": {name: round(megabytes / t, 1) for name, t in best.items()},
            "MB/s, median": {name: round(megabytes / t, 1) for name, t in middle.items()},
            "core seconds per GB": {n: round(min(c for _, c in r) / megabytes * 1000, 3) for n, r in methods.items()},
            "ours / the faster other, fastest rounds": round(min(best[n] for n in others) / best["ours"], 3),
            "ours / the faster other, medians": round(min(middle[n] for n in others) / middle["ours"], 3),
            "cost of hashes, fastest rounds": round(best["ours"] / best[plain] - 1, 4),
            "cost of hashes, medians": round(middle["ours"] / middle[plain] - 1, 4),
            "cost of hashes, median of the rounds' own": round(
                statistics.median(a / b - 1 for (a, _), (b, _) in zip(methods["ours"], methods[plain], strict=True)), 4
            ),
        }
        if kind == "save":
            result[kind]["ours / torch.save without sync, fastest rounds"] = round(best["torch.save"] / best["ours"], 3)
    extra = min(t for t, _ in timings["load, cold"]["ours"]) - min(t for t, _ in timings["load, cold"]["ours without hashes"])
    result["verification at load (cold) / time of a save"] = round(extra / min(t for t, _ in timings["save"]["ours"]), 4)
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    layers = max(1, args.megabytes // 100)
    config = ModelConfig(8192, 768, layers, 8, 2048, ("metala",) * layers)
    folder = args.folder / f"bench-checkpoint-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        methods = Methods(folder, config)
        megabytes = methods.full.nbytes() / 1e6
        timings = measure(methods, args.rounds)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {shutil.disk_usage(folder).total / 1e9:.0f} GB disk",
            "torch": torch.__version__,
            "state, MB": round(megabytes, 1),
            "rounds": args.rounds,
            "load of the machine": os.getloadavg()[0],
            **summary(timings, megabytes),
            "background save keeps the training thread, s": round(stall(methods), 3),
            "seconds": timings,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)


if __name__ == "__main__":
    main()
