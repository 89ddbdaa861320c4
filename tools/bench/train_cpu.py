"""Training speed on this machine: our MetaLA against a `transformers` Llama of the same size, as ratios from one run.

    python tools/bench/train_cpu.py [--lengths 512 2048 8192] [--output benchmarks/results/NAME.json]

Both models have the same layers, width, heads, MLP width and vocabulary, see the same tokens per step, run in fp32 with the
same AdamW. Steps of the two alternate, so that a busy machine slows both; the median step counts. Llama runs as its
library ships it (SDPA attention); ours as `engine/single_process.py` runs it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.engine.cpu import tune_cpu
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.model.loss import token_loss
from megatron.parallel.shard_spec import slice_of
from tools.bench.cpu_result import save_result


def our_model(args: argparse.Namespace) -> nn.Module:
    """The MetaLA of the comparison."""
    config = ModelConfig(args.vocab, args.hidden, args.layers, args.heads, args.mlp, ("metala",) * args.layers)
    with torch.device("meta"):
        model = build_model(config)
    specs = param_specs(config)
    names = {name: name for name in specs}
    init_weights(
        model, names, specs, config, 1, slices=lambda s: slice_of(s.shape, s.cut, 0, 1), device="cpu", dtype=torch.float32
    )
    return model


def llama_model(args: argparse.Namespace) -> nn.Module:
    """The Llama of the comparison: tied embeddings, rotary positions, SwiGLU, as many parameters but for the mixer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=max(args.lengths),
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def stepper(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """One training step as a function of tokens -> seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor) -> float:
        start = time.perf_counter()
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return time.perf_counter() - start

    return step


def compare(args: argparse.Namespace) -> list[dict[str, float]]:
    """A row per sequence length: tokens/s of both and their ratio."""
    ours, llama = our_model(args), llama_model(args)
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("metala", ours), ("llama", llama))}
    print(f"parameters: {sizes}")
    run_ours = stepper(ours, lambda t: token_loss(ours(t[:, :-1].contiguous())[0], t[:, 1:].contiguous()))
    run_llama = stepper(llama, lambda t: llama(input_ids=t[:, :-1].contiguous(), labels=t[:, :-1].contiguous()).loss)
    rows = []
    for length in args.lengths:
        batch = max(1, args.tokens // length)
        tokens = torch.randint(0, args.vocab, (batch, length + 1), generator=torch.Generator().manual_seed(length))
        times: dict[str, list[float]] = {"metala": [], "llama": []}
        for repeat in range(args.repeats + 1):
            for name, step in (("metala", run_ours), ("llama", run_llama)):
                seconds = step(tokens)
                if repeat:  # the first of each warms up
                    times[name].append(seconds)
        speed = {name: batch * length / statistics.median(values) for name, values in times.items()}
        row = {"seq_length": length, "batch": batch, **{f"{n}_tokens_per_s": round(v, 1) for n, v in speed.items()}}
        row["ratio"] = round(speed["metala"] / speed["llama"], 3)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=704)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    tune_cpu()
    tune_cpu()
    rows = compare(args)
    shape = {k: getattr(args, k) for k in ("hidden", "layers", "heads", "mlp", "vocab", "tokens")}
    save_result("train_cpu", args.output, rows, shape=shape)


if __name__ == "__main__":
    main()
