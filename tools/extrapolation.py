"""Length extrapolation (arXiv 2108.12409) on this machine: one small model per position encoding, evaluated at longer lengths.

Each model is trained by `train.py` from the same YAML, seed and data; only `pos_emb` (or the mixer) differs. The validation
split is then scored non-overlapping and through a sliding window. Writes a JSON with every number and a PNG.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import DataError, exit_on_error
from megatron.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
MODELS: dict[str, tuple[str, ...]] = {
    "alibi": ("pos_emb=alibi",),
    "rotary": ("pos_emb=rotary",),
    "learned": ("pos_emb=learned",),
    "none": ("pos_emb=none",),
    "metala": ("pos_emb=none", 'attention_config=[[["metala"], "all"]]'),
}


def trained(name: str, config: str, folder: Path, extra: Sequence[str]) -> dict[str, float]:
    """Train one model into `folder / name` with the settings `extra` unless it exists; returns wall-clock and CPU seconds."""
    run_dir, record_path = folder / name, folder / name / "trained.json"
    if record_path.is_file():
        durations: dict[str, float] = read_json(record_path)
        return durations
    settings = [f"run_dir={run_dir}", f"save={run_dir}/checkpoints", *extra]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [word for setting in settings for word in ("--set", setting)]
    process = subprocess.run([sys.executable, "train.py", config, *words], cwd=ROOT, check=False)
    if process.returncode:
        raise DataError(f"the {name} model was not trained", why=f"train.py ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    durations = {"train_seconds": round(time.monotonic() - started, 1), "train_processor_seconds": round(cpu_seconds, 1)}
    write_json(record_path, durations)
    return durations


def evaluated(folder: Path, config: str, a: argparse.Namespace) -> dict[str, Any]:
    """Both evaluations of the model in `folder`: rows per length."""
    import torch

    from megatron.checkpoint.find import find_checkpoint
    from megatron.config.load import load_config
    from megatron.evaluation.documents import measured, split_tokens
    from megatron.evaluation.perplexity import score
    from megatron.generation.load import load_model
    from megatron.settings import tokenizer_of

    run = load_config([config], check=False)
    tokenizer = tokenizer_of(run)
    checkpoint = find_checkpoint(str(folder / "checkpoints"))
    assert checkpoint is not None and run.data.data_path is not None
    model, _ = load_model(checkpoint, dtype=torch.float32)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    plans = (("non-overlapping", a.limits[0], a.lengths), ("sliding", a.limits[1], a.sliding_lengths))
    for kind, limit, lengths in plans:
        stream = measured(split_tokens(run.data.data_path, run.data.split, "valid", limit), tokenizer)
        rows = []
        for length in lengths:
            step = length if kind == "non-overlapping" else a.stride
            scored = score(model, stream.tokens, tokenizer.eod, length, step, vocab_size=tokenizer.vocab_size)
            rows.append(scored.report(stream.words, stream.size))
            print(f"  {folder.name} {kind} {length}: {rows[-1]['perplexity']:.3f} in {rows[-1]['seconds']} s", flush=True)
        result[kind] = rows
    return result


def main() -> None:
    """Train and evaluate all models, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/extrapolation.yml")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--sliding-lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--limits", nargs=2, type=int, default=[65536, 4096], metavar=("BLOCKS", "SLIDING"))
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="KEY=VALUE", help="for the training")
    parser.add_argument("--runs", type=Path, default=Path("runs/extrapolation"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "alibi-extrapolation")
    with exit_on_error():
        a = parser.parse_args()
        import torch

        from megatron.evaluation.report import plot_lengths

        started, trained_now = time.monotonic(), 0.0
        models: dict[str, Any] = {}
        for name in a.models:
            before = time.monotonic()
            models[name] = trained(name, a.config, a.runs, [*MODELS[name], *a.extra])
            trained_now += time.monotonic() - before
            models[name] |= evaluated(a.runs / name, a.config, a)
        facts: dict[str, Any] = {
            "command": f"python tools/extrapolation.py {' '.join(sys.argv[1:])}".strip(),
            "config": a.config,
        }
        facts |= {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        a.output.parent.mkdir(parents=True, exist_ok=True)
        facts["evaluation_processor_seconds"] = round(time.process_time(), 1)
        facts["evaluation_seconds"] = round(time.monotonic() - started - trained_now, 1)
        # for all models, including those trained by an earlier, interrupted run
        facts["seconds"] = round(facts["evaluation_seconds"] + sum(model["train_seconds"] for model in models.values()), 1)
        write_json(a.output.with_suffix(".json"), {**facts, "stride": a.stride, "models": models})
        curves = {name: model["non-overlapping"] for name, model in models.items()}
        print(plot_lengths(curves, a.output.with_suffix(".png"), "trained at 128 tokens, non-overlapping evaluation", 128))
        sliding = {f"{name}, sliding": model["sliding"] for name, model in models.items()}
        place = a.output.with_name(a.output.name + "-sliding.png")
        print(plot_lengths(sliding, place, f"trained at 128 tokens, sliding evaluation, stride {a.stride}", 128))


if __name__ == "__main__":
    main()
