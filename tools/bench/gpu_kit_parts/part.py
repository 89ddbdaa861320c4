"""What every part of the GPU kit has: rows that survive a kill, a clock that sees the device alone, and inputs."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench.gpu_kit import WARM, stored


class Part:
    """One part: its name, device, dtype and file of rows.

    Args:
        name: of the part.
        output: folder of the rows.
        rehearse: run on the CPU, in fp32, at tiny shapes.
    """

    def __init__(self, name: str, output: Path, rehearse: bool) -> None:
        self.name, self.rehearse, self.output = name, rehearse, output
        self.device, self.dtype = ("cpu", torch.float32) if rehearse else ("cuda", torch.bfloat16)
        self._rows, self._at = output / f"{name}.jsonl", output / f"{name}.at"
        self._keys = {row.get("key") for row in stored(self._rows)}
        if WARM not in os.environ and self._at.exists():  # the process before this one died here
            self._store({"key": self._at.read_text(), "error": "the process ended while it measured this row"})
        self._flush: Tensor | None = None
        self._warming = os.environ.get(WARM)
        self._met = 0
        self.all_rows = False  # in a process that compiles ahead: every row, not its share

    def _store(self, row: Mapping[str, Any]) -> None:
        with self._rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keys.add(row["key"])
        self._at.unlink(missing_ok=True)

    @property
    def calls(self) -> int:
        """How many calls to profile."""
        return 5 if self.device == "cuda" and self.warming is None else 1

    @property
    def warming(self) -> tuple[int, int] | None:
        """(number, count) of this process among those that compile ahead; None in the one that measures."""
        if self._warming is None:
            return None
        number, count = self._warming.split()
        return int(number), int(count)

    def row(self, key: str, measure: Callable[..., Mapping[str, Any]], *arguments: Any) -> None:
        """Store what `measure(*arguments)` returns under `key`, once; an exception is stored instead and stops no other row."""
        if key in self._keys:
            return
        if self.warming is not None:
            number, count = self.warming
            self._met += 1
            if self.all_rows or self._met % count == number:
                with contextlib.suppress(Exception):
                    measure(*arguments)
            return
        self._at.write_text(key)
        begin = time.perf_counter()
        try:
            fields = dict(measure(*arguments))
        except Exception as error:  # any: the other rows are worth having
            fields = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
        self._store({"key": key, **fields, "took_s": round(time.perf_counter() - begin, 2)})
        if self.device == "cuda":
            torch.cuda.synchronize()  # a broken context ends the process here; the driver starts the part again behind this row
            torch.cuda.empty_cache()

    def ms(self, call: Callable[[], Any], calls: int = 20) -> float:
        """Median milliseconds of the device, without the time to launch kernels and with nothing in the L2 cache.

        The device waits about three milliseconds before each call, so that all of its kernels are queued when the first starts.
        On a CPU it is the time of one call.
        """
        if self.device == "cpu" or self.warming is not None:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        if self._flush is None:
            self._flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # 256 MiB: five times the cache
        for _ in range(3):
            call()
        times = []
        for _ in range(calls):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            torch.cuda._sleep(6_000_000)
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
        return float(statistics.median(times))

    def forward_and_backward(self, run: Callable[[], Tensor], leaves: Sequence[Tensor], calls: int = 20) -> dict[str, float]:
        """ms of the forward without gradients, and of forward and backward, which is called half as often."""
        with torch.no_grad():
            forward = self.ms(run, calls)
        up = torch.ones_like(run())
        both = self.ms(lambda: torch.autograd.grad(run(), list(leaves), up), calls // 2)
        return {"forward_ms": forward, "forward_backward_ms": both}

    def fact(self, key: str, field: str) -> float | None:
        """A number of the part `facts`; None where it has not run."""
        rows = stored(self.output / "facts.jsonl")
        return next((float(str(row[field])) for row in rows if row.get("key") == key and field in row), None)

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers of this shape, the same ones on every device."""
        numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device, dtype or self.dtype)

    def metala(self, b: int, t: int, h: int, k: int, v: int, gate: float = 2.0) -> tuple[Tensor, Tensor]:
        """Leaves: a packed projection [b, t, h (2k + 2v)] with gate logits of this mean, and w [h, k]."""
        packed = self.random(b, t, h * (2 * k + 2 * v))
        packed[..., h * k : 2 * h * k] = packed[..., h * k : 2 * h * k] * 1.5 + gate
        return packed.requires_grad_(), (self.random(h, k, seed=1) * 0.3).requires_grad_()


def error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, formed in fp64 on the CPU."""
    wide = exact.detach().double().cpu()
    return float((value.detach().double().cpu() - wide).norm() / wide.norm().clamp_min(1e-30))
