"""Hugging Face folder -> checkpoint and a YAML that trains it on: the command around `megatron.interop.import_hf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import exit_on_error


def main() -> None:
    """Parse the command line, import, say what was inferred."""
    known = "MetaLA, Based, JRT, Mamba, GPT-NeoX, Llama, Mistral, Bloom, MPT, or an export of ours"
    parser = argparse.ArgumentParser(description=f"Import a Hugging Face folder: {known}.")
    parser.add_argument("--input", type=Path, required=True, help="folder with config.json and the weights")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write (`load` of a run)")
    parser.add_argument("--data", help="to train on: prefix of token files, or a file or folder of text (jsonl, txt, ...)")
    with exit_on_error():
        arguments = parser.parse_args()
        from megatron.interop.import_hf import import_folder
        from megatron.recipe import announcement, start_of

        made = import_folder(arguments.input, arguments.output)
        for note in made.notes:
            print(f"  {note}")
        shape = made.config
        print(
            f"wrote {made.checkpoint}: {shape.num_layers} layers, hidden size {shape.hidden_size}, {shape.num_heads} heads,"
            f" MLP {shape.mlp_width}, vocabulary {shape.vocab_size:,}"
        )
        start = start_of(made.checkpoint, shape, arguments.input.resolve().name, arguments.data)
        print(announcement(start))


if __name__ == "__main__":
    main()
