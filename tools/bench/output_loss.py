"""Output projection and loss, plain against a block of tokens at a time: seconds and peak memory, each in a process of its own.

    python tools/bench/output_loss.py [--tokens 2048] [--hidden 256] [--vocab 32000] [--output FILE.json]

Both do what a training step does with the last hidden states: loss, and the gradients of states and matrix. Peak memory is what
the process holds at most, less what it held before the first step; time is processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.engine.cpu import tune_cpu
from megatron.files import write_json
from megatron.model.linear_loss import linear_token_loss
from megatron.model.loss import token_loss


def measure(block: int, tokens: int, hidden: int, vocab: int, repeats: int) -> dict[str, float]:
    """Median seconds and peak MiB of one variant; block 0 is the plain one."""
    tune_cpu()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, hidden, generator=g).requires_grad_()
    matrix = (torch.randn(vocab, hidden, generator=g) * 0.02).requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens), generator=g)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        loss = linear_token_loss(x, matrix, labels, None, block=block) if block else token_loss(x @ matrix.t(), labels)
        torch.autograd.grad(loss, (x, matrix))
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"processor_seconds": round(statistics.median(seconds[1:]), 4), "peak_mib": round(peak / 1024, 1)}


def main() -> None:
    """A row per block size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.alone is not None:
        print(json.dumps(measure(args.alone, args.tokens, args.hidden, args.vocab, args.repeats)))
        return
    rows = []
    for block in args.blocks:
        shape = ["--tokens", str(args.tokens), "--hidden", str(args.hidden), "--vocab", str(args.vocab)]
        command = [sys.executable, __file__, "--alone", str(block), "--repeats", str(args.repeats), *shape]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"block": block, **json.loads(done.stdout)})
        print(json.dumps(rows[-1]), flush=True)
    if args.output:
        shape_of = {k: getattr(args, k) for k in ("tokens", "hidden", "vocab")}
        place = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        write_json(
            args.output,
            {"benchmark": "output_loss", "device": place, "torch": torch.__version__, "shape": shape_of, "rows": rows},
        )


if __name__ == "__main__":
    main()
