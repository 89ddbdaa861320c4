"""The console command `linear-neox`, a single entry point for the commands of the checkout.

    linear-neox train configs/metala.yml       deepy.py train.py, on the configured number of processes
    linear-neox generate | eval CONFIG         generate.py, eval.py
    linear-neox data prepare | tokenize | ...  prepare_data.py, tools/datasets/preprocess_data.py, tools/data.py
    linear-neox convert to-hf | from-hf | from-neox
    linear-neox checkpoint inspect | verify | diff | reshard | import

Further arguments go to that command. Neither torch nor the command is imported before the command is selected.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping, Sequence

from megatron import __version__
from megatron.errors import exit_on_error
from megatron.launch.environment import read_rank_environment
from megatron.shipped import shipped_root

_SCRIPTS = ("train.py", "generate.py", "eval.py")
_USAGE = "usage: linear-neox train | launch | generate | eval | data | convert | checkpoint  [arguments], or --version"
# Words -> the command's file in the checkout, and arguments that precede the user's.
COMMANDS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("train",): ("deepy.py", "train.py"),
    ("launch",): ("deepy.py",),
    ("generate",): ("generate.py",),
    ("eval",): ("eval.py",),
    ("data", "prepare"): ("prepare_data.py",),
    ("data", "tokenize"): ("tools/datasets/preprocess_data.py",),
    ("data", "train-tokenizer"): ("tools/datasets/train_tokenizer.py",),
    ("data", "inspect"): ("tools/data.py", "inspect"),
    ("data", "verify"): ("tools/data.py", "verify"),
    ("data", "samples"): ("tools/data.py", "samples"),
    ("data", "merge"): ("tools/data.py", "merge"),
    ("data", "count"): ("tools/data.py", "count"),
    ("convert", "to-hf"): ("tools/convert_to_hf.py",),
    ("convert", "from-hf"): ("tools/convert_from_hf.py",),
    ("convert", "from-neox"): ("tools/convert_from_neox.py",),
    ("checkpoint",): ("tools/checkpoint.py",),
}


def command_line(words: Sequence[str]) -> list[str] | None:
    """The command's file and its arguments; None if `words` name no command."""
    for length in (2, 1):
        name = tuple(words[:length])
        if len(name) < length or name not in COMMANDS:
            continue
        file, *first_arguments = COMMANDS[name]
        user_arguments = list(words[length:])
        if name == ("train",) and read_rank_environment().source != "none":  # a rank of torchrun or srun
            file, first_arguments = "train.py", []
        root = shipped_root()
        resolved = [str(root / word) if word.endswith(".py") else word for word in first_arguments]
        if name == ("launch",):  # our script of that name, unless this folder has one
            user_arguments = [str(root / w) if w in _SCRIPTS and not os.path.exists(w) else w for w in user_arguments]
        return [str(root / file), *resolved, *user_arguments]
    return None


def _help(words: Sequence[str]) -> str:
    """The usage message for commands that start with `words`."""
    completions = [" ".join(name) for name in COMMANDS if name[: len(words)] == tuple(words) and len(name) > len(words)]
    lines = "\n".join(f"  linear-neox {name} --help" for name in completions or map(" ".join, COMMANDS))
    return f"{_USAGE}\n\n{lines}"


def run(words: Sequence[str]) -> None:
    """Run the command that `words` name, as from the checkout."""
    groups = {name[:1] for name in COMMANDS}
    if not words or words[0] in ("-h", "--help"):
        print(_help([]))
        return
    if words[0] == "--version":
        print(f"linear-neox {__version__}")
        return
    with exit_on_error():
        line = command_line(words)
    if line is None:
        group = words[:1] if tuple(words[:1]) in groups else []
        wants_help = len(words) == 1 or words[1] in ("-h", "--help")
        if group and wants_help:
            print(_help(group))
            return
        print(f"error: there is no command 'linear-neox {' '.join(words[:2])}'\n{_help(group)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


def main() -> None:
    """The entry point."""
    run(sys.argv[1:])
