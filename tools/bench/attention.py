"""Speed of one attention layer, forward and backward: ours against the same layer of `transformers`, as ratios from one run.

    python tools/bench/attention.py [--lengths 512 2048] [--output benchmarks/results/attention-cpu.json]

`llama` is rotary attention against LlamaAttention (SDPA), `llama grouped` the same with a quarter of the key/value heads, `mpt`
ALiBi against MptAttention, `mistral` a window against MistralAttention. Same weights' shapes, same inputs; calls of the two
alternate and the median counts. On a CPU processor time is measured, which a busy machine disturbs little. A ratio above 1
means that ours is faster. On a GPU bf16 is used, and torch's bare SDPA is timed on the same shape as well.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from megatron.files import write_json
from megatron.layers.base import Context
from megatron.layers.softmax import AlibiAttention, SoftmaxAttention

Call = Callable[[Tensor], Tensor]
WINDOW = 255


def ours(kind: str, d: int, h: int) -> tuple[nn.Module, Call]:
    """Our layer and how to call it."""
    layer: SoftmaxAttention
    if kind == "mpt":
        layer = AlibiAttention(AlibiAttention.Config(d, h))
    else:
        groups = h // 4 if kind == "llama grouped" else None
        window = WINDOW if kind == "mistral" else None
        layer = SoftmaxAttention(SoftmaxAttention.Config(d, h, positions="rotary", kv_heads=groups, window=window))
    return layer, lambda x: layer(x, Context())[0]


def theirs(kind: str, d: int, h: int, s: int, device: str) -> tuple[nn.Module, Call]:
    """The layer of transformers and how its model calls it; tables and masks are made once, outside the measurement."""
    if kind == "mpt":
        from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

        layer: nn.Module = MptAttention(transformers.MptConfig(d_model=d, n_heads=h, max_seq_len=s), 0)
        bias = build_mpt_alibi_tensor(h, s, device=device)
        hidden = torch.ones(1, 1, s, s, dtype=torch.bool, device=device).triu(1)
        return layer, lambda x: layer(x, position_bias=bias, attention_mask=hidden)[0]
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    groups = h // 4 if kind == "llama grouped" else h
    config = transformers.LlamaConfig(
        hidden_size=d, num_attention_heads=h, num_key_value_heads=groups, max_position_embeddings=s
    )
    config._attn_implementation = "sdpa"
    layer = LlamaAttention(config, 0)
    positions = torch.arange(s, device=device)[None]
    mask = None
    if kind == "mistral":  # what MistralModel hands to the same attention
        near = positions[0][:, None] - positions[0][None]
        mask = ((near >= 0) & (near <= WINDOW))[None, None]
    rotary = LlamaRotaryEmbedding(config).to(device)

    def call(x: Tensor) -> Tensor:
        return layer(x, position_embeddings=rotary(x, positions), attention_mask=mask)[0]

    return layer, call


def bare(d: int, h: int) -> Call:
    """SDPA alone on the same shape, as the floor: no projections."""

    def call(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (h, d // h)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    return call


def seconds(call: Call, x: Tensor) -> float:
    """One forward and backward: of the clock on a GPU, of the processor on a CPU."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    if x.is_cuda:
        torch.cuda.synchronize()
    started = clock()
    call(x).float().square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


def compare(kind: str, s: int, a: argparse.Namespace) -> dict[str, Any]:
    """Alternating calls of both layers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    calls: dict[str, Call] = {}
    for name, (layer, call) in {
        "ours": ours(kind, a.hidden, a.heads),
        "theirs": theirs(kind, a.hidden, a.heads, s, device),
    }.items():
        layer.to(device, dtype)
        calls[name] = call
    if device == "cuda":
        calls["sdpa"] = bare(a.hidden, a.heads)
    batch = max(1, a.tokens // s)
    x = torch.randn(batch, s, a.hidden, device=device, dtype=dtype, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(a.repeats + 2):
        for name, call in calls.items():
            took = seconds(call, x)
            if turn > 1:
                times[name].append(took)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "kind": kind,
        "length": s,
        "batch": batch,
        **{f"{name}_ms": round(1000 * value, 3) for name, value in medians.items()},
        "ratio": round(medians["theirs"] / medians["ours"], 3),
        "pairwise_ratio": round(statistics.median(t / o for o, t in zip(times["ours"], times["theirs"], strict=True)), 3),
    }


def main() -> None:
    """Run all cases, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--kinds", nargs="+", default=["llama", "llama grouped", "mpt", "mistral"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    a = parser.parse_args()
    rows = []
    for kind in a.kinds:
        for length in a.lengths:
            rows.append(compare(kind, length, a))
            print(rows[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "hidden": a.hidden, "heads": a.heads}
    if a.output is not None:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.output, {**facts, "rows": rows})
        print(f"wrote {a.output}")


if __name__ == "__main__":
    main()
