"""Generates with exported folders under the transformers of this interpreter: the second half of the cross matrix.

    python tools/compat/use_folders.py FOLDER OUTPUT.json WHAT

WHAT is JSON: `families`, `prompts`, `length`. Nothing of this project is imported: a folder stands alone. All in fp64, where
what differs is the algorithm and not the rounding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "use_cache": True},
    "greedy without cache": {"num_beams": 1, "use_cache": False},
    "beams": {"num_beams": 3, "use_cache": True},
    "beams without cache": {"num_beams": 3, "use_cache": False},
}
"""What is generated, always for one batch of all prompts, padded on the left."""


def new_tokens(folder: Path, prompts: list[str], length: int) -> dict[str, list[list[int]]]:
    """What a folder's model writes, way by way.

    Args:
        folder: an exported folder.
        prompts: texts of different lengths.
        length: most new tokens per prompt.

    Returns:
        Way -> per prompt the new tokens up to the end token, which is left out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = {}
    for decoding, options in WAYS.items():
        rows = model.generate(**batch, max_new_tokens=length, do_sample=False, **options)[:, batch.input_ids.shape[1] :]
        end = tokenizer.eos_token_id
        tokens[decoding] = [row[: row.index(end)] if end in row else row for row in rows.tolist()]
    return tokens


if __name__ == "__main__":
    source, request = Path(sys.argv[1]), json.loads(sys.argv[3])
    result: dict[str, Any] = {}
    for name in request["families"]:
        try:
            result[name] = new_tokens(source / name, request["prompts"], request["length"])
        except Exception as error:  # whatever a release of transformers raises is the result of this pair
            result[name] = f"{type(error).__name__}: {error}"
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
