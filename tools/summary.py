"""The closing words of `make train`: how far the loss fell, a sample, and where everything lies."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import UserError, exit_on_error


def validation_losses(metrics: Path) -> list[tuple[int, float]]:
    """(iteration, validation loss) in order."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(row["iteration"], row["validation/lm_loss"]) for row in rows if "validation/lm_loss" in row]


def summary(run: Path) -> str:
    """The text; a run without metrics is a UserError."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError("there is no finished run here", where=str(metrics), hint="make train")
    losses = validation_losses(metrics)
    lines = ["", "-" * 78]
    if losses:
        (_, first), (step, last) = losses[0], losses[-1]
        lines.append(f"validation loss   {first:.3f} -> {last:.3f} after {step} steps ({last / first:.1%} of its first value)")
    samples = run / "samples.jsonl"
    if samples.is_file():
        sample = json.loads(samples.read_text(encoding="utf-8").splitlines()[0])
        text = (sample["context"] + sample["text"]).replace("\n", "\n                  ")
        lines.append(f"a sample          {text}")
    places = {
        "plot": run / "loss.png",
        "metrics": metrics,
        "checkpoints": run / "checkpoints",
        "HF folder": run / "hf",
        "samples": samples,
        "config": run / "config.yml",
    }
    lines += [f"{name:17} {path}" for name, path in places.items() if path.exists()]
    lines.append(f'use it            AutoModelForCausalLM.from_pretrained("{run / "hf"}", trust_remote_code=True)')
    return "\n".join(lines)


def main() -> None:
    """Print the summary of one run folder."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder, such as runs/metala-quickstart")
    arguments = parser.parse_args()
    with exit_on_error():
        print(summary(arguments.run))


if __name__ == "__main__":
    main()
