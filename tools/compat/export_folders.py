"""Exports a tiny model of every family under the transformers of this interpreter: the first half of the cross matrix.

    python tools/compat/export_folders.py FOLDER

Each `FOLDER/FAMILY` is an exported folder; `FOLDER/expected.json` holds the trainer's own greedy tokens for the same prompts,
from its states and from running the whole text again for each token. The two differ where a prompt is shorter than JRT's
prefix: the prefix then grows with the text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.export.hf import export_checkpoint
from megatron.generation.load import load_model
from megatron.generation.sample import Sampling, generate
from tools.compat.families import END, FAMILIES, NEW_TOKENS, PROMPTS, VOCABULARY, write_checkpoint


def export_families(folder: Path) -> dict[str, Any]:
    """Write the exported folders.

    Returns:
        Family -> "greedy" and "greedy without cache" -> the trainer's tokens per prompt; or why the export refused.
    """
    expected: dict[str, Any] = {}
    for name in FAMILIES:
        checkpoint = write_checkpoint(name, folder / "checkpoints" / name)
        model, _ = load_model(checkpoint, dtype=torch.float64)
        prompts = [list(prompt.encode()) for prompt in PROMPTS]
        expected[name] = {}
        for decoding, recompute in (("greedy", False), ("greedy without cache", True)):
            sampling = Sampling(maximum_tokens=NEW_TOKENS, recompute=recompute)
            texts = generate(model, prompts, sampling, eod=END, vocab_size=VOCABULARY)
            expected[name][decoding] = [text.tokens for text in texts]
        try:
            export_checkpoint(checkpoint, folder / name)
        except Exception as error:  # whatever a release of transformers raises is the result of this family
            expected[name] = f"export: {type(error).__name__}: {error}"
    return expected


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    (target / "expected.json").write_text(json.dumps(export_families(target)), encoding="utf-8")
