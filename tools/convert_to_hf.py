"""Checkpoint -> Hugging Face folder, compared before it is kept: the command around `megatron.export.hf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import exit_on_error


def main() -> None:
    """Parse the command line, export, say what was made."""
    parser = argparse.ArgumentParser(description="Export a checkpoint (any tensor x pipeline layout) for transformers.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/global_stepN")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16 or float64")
    parser.add_argument("--max-shard-size", type=float, default=5.0, help="GB of weights per file")
    parser.add_argument("--keep-padding", action="store_true", help="keep vocabulary rows beyond the tokenizer's size")
    arguments = parser.parse_args()
    with exit_on_error():
        from megatron.export.hf import export_checkpoint

        made = export_checkpoint(
            arguments.checkpoint,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_bytes=int(arguments.max_shard_size * 1e9),
            keep_padding=arguments.keep_padding,
        )
        for note in made.notes:
            print(f"  {note}")
        print(f"wrote {made.folder} ({made.family}, {made.parameters:,} parameters)")
        trust = ", trust_remote_code=True" if any(made.folder.glob("*.py")) else ""
        print(f'load it: AutoModelForCausalLM.from_pretrained("{made.folder}"{trust})')


if __name__ == "__main__":
    main()
