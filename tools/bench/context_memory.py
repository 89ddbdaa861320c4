"""Activation memory of a rank under context parallelism: bytes that one forward pass saves for its backward, on real ranks.

    python tools/bench/context_memory.py [--tokens 8192 32768] [--output benchmarks/results/context-memory.json]

Counted are the storages of the saved tensors, each once, without parameters: what is alive between forward and backward. Ranks
are CPU processes connected by gloo. The loss is left out; `loss_chunk_tokens` bounds its logits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron.engine.base import EngineSettings
from megatron.engine.stages import build_local, run_stages
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from tools.bench.cpu_result import save_result

SIZES = (1, 2, 4)
_MIB = 2**20


def saved_bytes(mesh: Mesh, tokens: int, mixer: str) -> int:
    """Bytes that two blocks save for one row of `tokens` tokens on this rank."""
    config = ModelConfig(256, 128, 2, 4, 256, (mixer,) * 2)
    settings = EngineSettings(seq_length=tokens, loss_chunk_tokens=1024)
    local = build_local(config, mesh, settings, torch.device("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in local.parameters.values()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = torch.zeros(1, tokens // mesh.cp, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run_stages(local.stages, (row,))
    assert isinstance(out, Tensor)
    return sum(storages.values())


def _rank(rank: int, size: int, store: str, lengths: list[int], results: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = Mesh.create(1, 1, size, rank, cp=size)
    for mixer in ("metala", "based"):
        for tokens in lengths:
            value = torch.tensor([saved_bytes(mesh, tokens, mixer)])
            if size > 1:
                dist.all_reduce(value, op=dist.ReduceOp.MAX)
            if rank == 0:
                results.append({"mixer": mixer, "tokens": tokens, "context_parallel_size": size, "MiB": int(value) / _MIB})
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with mp.Manager() as manager:
        shared = manager.list()
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_rank, args=(size, f"{folder}/store", args.tokens, shared), nprocs=size)
        rows = list(shared)
    alone = {(row["mixer"], row["tokens"]): row["MiB"] for row in rows if row["context_parallel_size"] == 1}
    print("| mixer | tokens | context_parallel_size | MiB saved on the fullest rank | of one process |\n|---|---|---|---|---|")
    for row in rows:
        row["of one process"] = round(row["MiB"] / alone[row["mixer"], row["tokens"]], 4)
        row["MiB"] = round(row["MiB"], 2)
        print(
            f"| {row['mixer']} | {row['tokens']:,} | {row['context_parallel_size']} | {row['MiB']} | {row['of one process']} |"
        )
    save_result("context_memory", args.output, rows, measured="storages saved for the backward", model="2 x 128, 4 heads, fp32")


if __name__ == "__main__":
    main()
