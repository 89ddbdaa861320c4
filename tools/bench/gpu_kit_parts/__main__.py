"""One part of the GPU kit in this process: `python -m tools.bench.gpu_kit_parts NAME --output DIR [--rehearse]`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tools.bench.gpu_kit_parts.part import Part

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("name")
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--rehearse", action="store_true")
args = parser.parse_args()
importlib.import_module(f"tools.bench.gpu_kit_parts.{args.name.partition('-')[0]}").run(
    Part(args.name, args.output, args.rehearse)
)
