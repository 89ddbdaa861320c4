"""Messages of tensor parallelism per MetaLA layer: ours, counted by a hook, against the original's gather-everything layout.

    python tools/bench/communication.py [--tp 2 4] [--output benchmarks/results/communication.json]

Real gloo ranks run one forward and backward pass of one block both ways on a small shape; counts do not depend on the shape
and bytes grow with batch x sequence x width, so the table is also given for a 3B model. The original splits each of the four
projections on its own and gathers every result (`gather_output=True`), runs all heads on every rank, and scatters the result
into a row-parallel output (spec metala_alibi A14 M1; the pairs of forward and backward are those of NeoX's column- and
row-parallel layers). The MLP is the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.files import write_json
from megatron.layers.base import Context
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.mlp import MLP
from megatron.parallel.collectives import CopyToTP, ReduceFromTP
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import shard_model
from megatron.parallel.traffic import Message, count_traffic

SHAPE = {"b": 2, "s": 16, "d": 64, "heads": 4}
LARGE = {"b": 4, "s": 4096, "d": 3072}


class _Gather(torch.autograd.Function):
    """Forward: the whole last dimension on every rank. Backward: this rank's columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, dist.get_rank(ctx.group) * ctx.width, ctx.width), None


class _Scatter(torch.autograd.Function):
    """Forward: this rank's columns. Backward: the whole last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        width = x.shape[-1] // dist.get_world_size(group)
        return x.narrow(-1, dist.get_rank(group) * width, width).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.group), None


class GatherEverything(nn.Module):
    """The original's movement of data around one MetaLA mixer; the recurrence in the middle sends nothing and is left out."""

    def __init__(self, d: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        t = dist.get_world_size(group)
        self.group = group
        self.copies = nn.ModuleList(CopyToTP(group) for _ in range(4))
        self.columns = nn.ModuleList(nn.Linear(d, width // t) for width in (d // 2, d // 2, d, d))
        self.row, self.reduce_from_tp = nn.Linear(d // t, d, bias=False), ReduceFromTP(group)

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, s, d]` -> `[b, s, d]`."""
        pairs = zip(self.copies, self.columns, strict=True)
        q, k, v, g = (_Gather.apply(linear(copy(x)), self.group) for copy, linear in pairs)
        mixed = v * g + torch.cat((q, k), -1)
        return self.reduce_from_tp(F.linear(_Scatter.apply(mixed, self.group), self.row.weight))


def _ours(mesh: Mesh, sequence: bool) -> tuple[nn.Module, MLP]:
    config = ModelConfig(64, SHAPE["d"], 1, SHAPE["heads"], 2 * SHAPE["d"], ("metala",))
    model = build_model(config)
    shard_model(model, param_specs(config), mesh, sequence_parallel=sequence)
    for param in model.parameters():
        nn.init.normal_(param, std=0.02)
    block = model.model.blocks()[0]
    assert isinstance(block.channel_mixer, MLP)
    return block.token_mixer, block.channel_mixer


def _count(forward: Any, pieces: int = 1) -> list[Message]:
    x = torch.randn(SHAPE["b"], SHAPE["s"] // pieces, SHAPE["d"], requires_grad=True)
    with count_traffic() as messages:
        forward(x).square().mean().backward()
    return messages


def measure(tp: int, rank: int) -> dict[str, list[Message]]:
    """On one rank: the messages of each part."""
    mesh = Mesh.create(1, tp, tp, rank)
    assert mesh.tp_group is not None
    (mixer, mlp), (cut_mixer, cut_mlp) = _ours(mesh, False), _ours(mesh, True)
    original = GatherEverything(SHAPE["d"], mesh.tp_group)
    return {
        "ours": _count(lambda x: mlp(mixer(x, Context())[0])),
        "ours, sequence parallel": _count(lambda x: cut_mlp(cut_mixer(x, Context())[0]), tp),
        "original": _count(lambda x: mlp(original(x))),
    }


def on_ranks(tp: int) -> dict[str, list[Message]]:
    """Rank 0's messages, measured on `tp` forked gloo ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reader, writer = os.pipe()
    pids = []
    for rank in range(tp):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=tp)
            rows = {name: [vars(m) for m in found] for name, found in measure(tp, rank).items()}
            if rank == 0:
                os.write(writer, json.dumps(rows).encode())
            dist.destroy_process_group()
            os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise SystemExit(f"a rank failed: exit codes {codes}")
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return {name: [Message(**row) for row in found] for name, found in json.loads(pipe.read()).items()}


def row(tp: int, layout: str, messages: Sequence[Message]) -> dict[str, Any]:
    """One line of the table: counts, and bytes that a rank sends per layer and step."""
    kinds = Counter(("-".join(m.op.split("_")[:2]), "backward" if m.backward else "forward") for m in messages)
    unit = SHAPE["b"] * SHAPE["s"] * SHAPE["d"] * 4
    share = sum(m.sent for m in messages) / unit
    return {
        "tp": tp,
        "layout": layout,
        "forward": ", ".join(f"{n} {op}" for (op, way), n in sorted(kinds.items()) if way == "forward"),
        "backward": ", ".join(f"{n} {op}" for (op, way), n in sorted(kinds.items()) if way == "backward"),
        "activations_sent": round(share, 3),
        "mib_3b": round(share * LARGE["b"] * LARGE["s"] * LARGE["d"] * 2 / 2**20, 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    head = "| TP | layout | forward | backward | sent per rank, in activations [b, s, d] | MiB at b 4, s 4096, d 3072, bf16 |"
    lines = [head, "|---|---|---|---|---|---|"]
    for r in rows:
        cells = (r["tp"], r["layout"], r["forward"], r["backward"], r["activations_sent"], r["mib_3b"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = [row(tp, name, found) for tp in arguments.tp for name, found in on_ranks(tp).items()]
    print(table(rows))
    if arguments.output:
        write_json(arguments.output, {"shape": SHAPE, "large": LARGE, "rows": rows})


if __name__ == "__main__":
    main()
