"""An alias of `tools/checkpoint.py import`: `--input global_stepN --config its.yml more.yml --output FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import exit_on_error
from tools.checkpoint import import_neox, make_parser


def main() -> None:
    """Parse the command line and import."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, help="global_stepN folder of GPT-NeoX, any tensor-parallel size")
    parser.add_argument("--config", nargs="+", default=[], help="the YAML files that the model was trained with")
    parser.add_argument("--output", required=True, help="checkpoint folder to write (`load` of a run)")
    with exit_on_error():
        arguments = parser.parse_args()
        import_neox(make_parser().parse_args(["import", arguments.input, *arguments.config, "--output", arguments.output]))


if __name__ == "__main__":
    main()
