"""The recall-memory dial: how many bytes of state a model carries from token to token, and what its two knobs do to that.

    python tools/dial.py configs/based-360m.yml [--windows 16 64 128] [--features 8 16 24] [--output benchmarks/results/dial]

Based's paper (arXiv 2402.18668, section 3) shows that what a model recalls grows with the state that it carries; its window and
its feature width are the two knobs. The first table splits the state of the config by kind of layer and of memory, as the
layers themselves say (`init_state`): recurrent sums in fp32, windows and convolutions in bf16. The second turns the knobs. With
`--output` both are also written as JSON and PNG. Layers that keep every token are counted at `--tokens` tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.load import load_config
from megatron.errors import exit_on_error
from megatron.files import write_json
from megatron.model.config import ModelConfig
from megatron.model.state_size import state_bytes, total
from megatron.settings import model_config


def turned(config: ModelConfig, window: int, feature: int) -> ModelConfig:
    """The same model with another window and another feature width."""
    options = {name: dict(values) for name, values in config.layer_options.items()}
    knobs = {"sliding": {"window": window}, "based": {"feature_width": feature}, "jrt": {"feature_width": feature}}
    for name, knob in knobs.items():
        if name in config.layer_types:
            options[name] = options.get(name, {}) | knob
    return replace(config, layer_options=options)


def table(rows: list[list[str]]) -> str:
    """Columns of equal width, numbers on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    return "\n".join("  ".join(row) for row in cells)


def describe(parts: Mapping[str, Mapping[str, int]], layers: tuple[str, ...]) -> str:
    """The first table."""
    memories = list(dict.fromkeys(m for of in parts.values() for m in of))
    rows = [["mixer", "layers", *memories, "bytes"]]
    for kind, of in parts.items():
        rows.append([kind, str(layers.count(kind)), *(f"{of.get(m, 0):,}" for m in memories), f"{sum(of.values()):,}"])
    sums = [f"{sum(of.get(m, 0) for of in parts.values()):,}" for m in memories]
    rows.append(["all", str(len(layers)), *sums, f"{total(parts):,}"])
    return table(rows)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Bytes over the window, a line per feature width; the config itself is marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for feature, row in zip(result["features"], result["dial"], strict=True):
        axes.plot(result["windows"], [value / 1e6 for value in row], marker="o", label=f"feature width {feature}")
    axes.axhline(result["total"] / 1e6, color="black", linestyle=":", label=f"{result['config']} as it is")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("window, previous tokens")
    axes.set_ylabel("state per sequence, MB")
    axes.set_title(f"recall-memory dial of {result['config']}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    """Print both tables; write them where asked."""
    loaded = load_config([args.config], check=False)
    rows = loaded.tokenizer.padded_vocab_size or 50304  # the state does not depend on the vocabulary
    config = model_config(loaded, rows)
    parts = state_bytes(config, args.tokens)
    print(describe(parts, config.layer_types))
    result: dict[str, Any] = {"config": args.config.stem, "tokens": args.tokens, "layers": parts, "total": total(parts)}
    if {"sliding", "based", "jrt"} & set(config.layer_types):
        dial = [[total(state_bytes(turned(config, w, f), args.tokens)) for w in args.windows] for f in args.features]
        head = [["feature width \\ window", *map(str, args.windows)]]
        print("\n" + table(head + [[str(f), *(f"{v:,}" for v in row)] for f, row in zip(args.features, dial, strict=True)]))
        result |= {"windows": args.windows, "features": args.features, "dial": dial}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output.with_suffix(".json"), result)
        if "dial" in result:
            plot(result, args.output.with_suffix(".png"))
        print(json.dumps({"written": str(args.output.with_suffix(".json"))}))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--features", type=int, nargs="+", default=[4, 8, 16, 24, 32])
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text for layers that keep all of it")
    parser.add_argument("--output", type=Path, default=None, help="JSON and PNG of this name are written")
    with exit_on_error():
        args = parser.parse_args()
        run(args)


if __name__ == "__main__":
    main()
