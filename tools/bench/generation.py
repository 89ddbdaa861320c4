"""Tokens/s of generation, in the shape of Based's table: models x batch x prompt x new tokens, each by several programs.

    python tools/bench/generation.py configs/based-quickstart.yml [--batches 1 8] [--prompts 256] [--new 64]
        [--output benchmarks/results/generation-cpu.json]

Models: the configuration's, and a softmax model of the same width, depth and number of parameters (rotary positions). Programs:
`trainer` (state and token steps, as `generate.py`), `transformers` (the exported folder; the softmax model is a Llama), and
`vllm` where it is installed (`make test-serving` makes such an environment). Weights are drawn, prompts random, tokens greedy;
repeats of all take turns and medians count, so that ratios come from one run. On a CPU times are processor time of all threads,
in which other work on the machine does not count. The time to the first token is that of the prompt and one token. Bytes per
sequence are those of the state, or keys and values, after the last token (vLLM: of its pages). A PNG beside the JSON shows
tokens/s.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import linear_neox as ln
from megatron.checkpoint.save import save_weights
from megatron.engine.cpu import tune_cpu
from megatron.export.hf import export_checkpoint
from megatron.generation.decode import TokenStep
from megatron.layers.base import State
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from tools.bench.cpu_result import save_result


class Run(Protocol):
    """A program over prompts; `nbytes` per sequence once it has written."""

    nbytes: int

    def __call__(self, count: int) -> None:
        """Write so many tokens after the prompts."""


def softmax_like(shape: ModelConfig) -> ModelConfig:
    """A Llama of the same width, depth and vocabulary, its MLP as wide as the number of parameters allows."""
    options = {"global": {"positions": "rotary"}}
    plain: dict[str, Any] = {"norm": "rmsnorm", "mlp": "gated", "activation": "silu", "mlp_bias": False, "residual_fp32": False}
    plain |= {"embedding_norm": False, "learned_positions": 0, "parallel_residual": False, "shared_norm": False}
    kinds = ("global",) * shape.num_layers
    other = replace(shape, layer_types=kinds, layer_options=options, embedding_scale=False, mlp_width=0, **plain)
    missing = ln.count_parameters(shape)[0] - ln.count_parameters(other)[0]
    return replace(other, mlp_width=max(8, round(missing / (3 * shape.hidden_size * shape.num_layers) / 8) * 8))


def bytes_of(state: list[State], rows: int) -> int:
    """Bytes per sequence of a state."""
    return sum(t.numel() * t.element_size() for part in state for t in part.values()) // rows


class Trainer:
    """The trainer's own generation."""

    def __init__(self, model: LanguageModel, prompts: Tensor) -> None:
        self.model, self.prompts, self.nbytes = model, prompts, 0

    def __call__(self, count: int) -> None:
        """See `Run`."""
        with torch.inference_mode():
            logits, state = self.model(self.prompts, None, self.model.init_state(len(self.prompts)))
            assert state is not None
            chosen, step = logits[:, -1].argmax(-1), None
            for _ in range(count - 1):
                step = step or TokenStep(self.model, state)
                chosen = step(chosen).argmax(-1)
            self.nbytes = bytes_of(state if step is None else step.state, len(self.prompts))


class Transformers:
    """The exported folder."""

    def __init__(self, model: Any, prompts: Tensor) -> None:
        self.model, self.prompts, self.nbytes = model, prompts.to(model.device), 0

    def __call__(self, count: int) -> None:
        """See `Run`."""
        how: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(self.prompts)
        made = self.model.generate(self.prompts, attention_mask=mask, return_dict_in_generate=True, **how)
        cache = made.past_key_values
        states = getattr(cache, "states", None)
        if states is None:
            states = [{"keys": layer.keys, "values": layer.values} for layer in cache.layers]
        self.nbytes = bytes_of(states, len(self.prompts))


class Vllm:
    """The exported folder in vLLM, its engine in this process."""

    def __init__(self, folder: Path, new: int, prompts: Tensor) -> None:
        from vllm import LLM

        rows, length = len(prompts), prompts.shape[1] + new
        options: dict[str, Any] = {
            "max_num_seqs": rows,
            "max_num_batched_tokens": max(2048, length),
            "enable_prefix_caching": False,
        }
        options |= {"enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32"}
        self.llm = LLM(str(folder), max_model_len=length, disable_log_stats=True, **options)
        self.prompts, self.longest = prompts.tolist(), length
        self.nbytes = self._page_bytes()

    def _page_bytes(self) -> int:
        """Of one sequence of the longest length, over all groups of layers."""
        core = self.llm.llm_engine.engine_core.engine_core
        groups, total = core.scheduler.kv_cache_config.kv_cache_groups, 0
        for group in groups:
            spec = group.kv_cache_spec
            blocks = spec.max_num_blocks_per_req(self.llm.llm_engine.vllm_config, self.longest)
            total += blocks * spec.page_size_bytes * (1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names))
        return int(total)

    def __call__(self, count: int) -> None:
        """See `Run`."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        self.llm.generate([{"prompt_token_ids": p} for p in self.prompts], how, use_tqdm=False)


def exported(shape: ModelConfig, model: LanguageModel, root: Path, name: str) -> Path:
    """The model's folder."""
    weights = {key: p.detach() for key, p in model.named_parameters()}
    facts: dict[str, Any] = {"facts": {}, "state": {"consumed_tokens": 0, "consumed_samples": 0}}
    saved = save_weights(
        root / name, weights, param_specs(shape), model_config=shape.to_dict(), iteration=0, tokenizer=None, **facts
    )
    return export_checkpoint(saved, root / f"{name}-hf").folder


def programs(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[Tensor], Run]]]:
    """(model, program, its start over prompts); folders are loaded before vLLM's plugin puts its own configurations first."""
    from transformers import AutoModelForCausalLM

    shape = replace(ln.model_config(args.config, vocab_size=args.vocabulary), hidden_dropout=0.0)
    root = Path(tempfile.mkdtemp())
    for name, each in (("model", shape), ("softmax", softmax_like(shape))):
        model = ln.build_model(each).eval()
        print(f"{name}: {ln.count_parameters(each)[0]:,} parameters", flush=True)
        folder = exported(each, model, root, name)
        yield name, "trainer", partial(Trainer, model)
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        yield name, "transformers", partial(Transformers, loaded)
        if importlib.util.find_spec("vllm") is not None:
            yield name, "vllm", partial(Vllm, folder, args.new)


def seconds(run: Run, count: int) -> float:
    """Of one call: processor time on a CPU, else as the clock says (results are read, so nothing is still running)."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    run(count)
    return clock() - start


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per model, program, batch and prompt length, with its ratios."""
    makers, rows = list(programs(args)), []
    for batch in args.batches:
        for length in args.prompts:
            prompts = torch.randint(0, args.vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
            runs = {(model, program): make(prompts) for model, program, make in makers}
            times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
            for repeat in range(args.repeats + 1):
                for key, run in runs.items():
                    one = (seconds(run, 1), seconds(run, args.new))
                    times[key] += [one] if repeat else []  # the first of each warms up
            speed = {key: batch * args.new / statistics.median(t for _, t in values) for key, values in times.items()}
            for (model, program), values in times.items():
                row = {"model": model, "program": program, "batch": batch, "prompt": length, "new": args.new}
                row |= {"tokens_per_s": round(speed[model, program], 1)}
                row |= {"first_token_ms": round(1e3 * statistics.median(t for t, _ in values), 2)}
                row |= {"bytes_per_sequence": runs[model, program].nbytes}
                row |= {"against_softmax": round(speed[model, program] / speed["softmax", program], 3)}
                row |= {"against_trainer": round(speed[model, program] / speed[model, "trainer"], 3)}
                rows.append(row)
                print(json.dumps(row), flush=True)
            del runs
            release()
    return rows


def release() -> None:
    """Memory of engines that are no more."""
    gc.collect()
    if "vllm" in sys.modules:
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of tokens/s: one group per batch and prompt, one bar per model and program."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((r["batch"], r["prompt"]) for r in rows))
    bars = list(dict.fromkeys((r["model"], r["program"]) for r in rows))
    figure, panel = plt.subplots(figsize=(4 + 2.4 * len(groups), 4))
    speed = {(r["model"], r["program"], r["batch"], r["prompt"]): r["tokens_per_s"] for r in rows}
    for number, key in enumerate(bars):
        heights = [speed[key + group] for group in groups]
        places = [i + (number - len(bars) / 2) * 0.8 / len(bars) for i in range(len(groups))]
        style: dict[str, Any] = {
            "color": f"C{['trainer', 'transformers', 'vllm'].index(key[1])}",
            "hatch": "//" if key[0] == "softmax" else "",
        }
        panel.bar(places, heights, 0.8 / len(bars), label=f"{key[0]}, {key[1]}", align="edge", edgecolor="white", **style)
    panel.set_xticks(range(len(groups)), [f"batch {b}, prompt {p}" for b, p in groups])
    panel.set_ylabel("new tokens/s")
    panel.set_title(title, fontsize=8)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML of a model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[256])
    parser.add_argument("--new", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    tune_cpu()
    rows = table(args)
    save_result("generation", args.output, rows, config=args.config)
    if args.output is not None:
        plot(rows, args.output.with_suffix(".png"), f"{args.config}, greedy, {args.new} new tokens")


if __name__ == "__main__":
    main()
