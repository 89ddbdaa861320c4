"""The page of all commands: usage, arguments and options, read from the parser that each command builds.

A command runs up to the point where it parses its command line, and no further.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from linear_neox.cli import COMMANDS
from megatron.config.cli import make_parser
from tools.ckpts.pointers import LEADS, POINTERS
from tools.reference.command_parsers import ROOT, stopped
from tools.reference.markdown import page, prose, table

# Sections of the page -> its commands, as paths from the root.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Training and models": ("deepy.py", "train.py", "generate.py", "eval.py"),
    "Data": (
        "prepare_data.py",
        "tools/datasets/preprocess_data.py",
        "tools/datasets/preprocess_data_with_mask.py",
        "tools/datasets/train_tokenizer.py",
        "tools/datasets/merge_datasets.py",
        "tools/data.py",
    ),
    "Checkpoints and formats": (
        "tools/checkpoint.py",
        "tools/convert_to_hf.py",
        "tools/convert_from_hf.py",
        "tools/convert_from_neox.py",
    ),
    "Evaluation and experiments": (
        "tools/launch_eval.py",
        "tools/collect_results.py",
        "tools/synthetics.py",
        "tools/figures_recall.py",
        "tools/dial.py",
        "tools/extrapolation.py",
    ),
    "Development": ("tools/layer.py", "tools/summary.py", "tools/compatibility.py", "tools/reference_pages.py"),
}
_WORDS = {"deepy.py": ["train.py", "x.yml"]}  # a script that must be named before anything is parsed
_MEASURE = "tools/bench"


def groups() -> dict[str, tuple[str, ...]]:
    """`GROUPS`, with the commands right under tools/ that it does not name as a last group."""
    named = {script for scripts in GROUPS.values() for script in scripts}
    others = [f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py"))]
    others = [script for script in others if script not in named]
    return {**GROUPS, **({"Others": tuple(others)} if others else {})}


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a command builds."""
    parser = stopped([script, *_WORDS.get(script, [])], parse=False).parser
    if parser is None:
        raise RuntimeError(f"{script} parses no command line")
    return parser


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """(argument, meaning) of all arguments of a parser, in their order."""
    formatter: Any = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        values = formatter._format_args(action, action.dest.upper() if action.option_strings else action.dest)
        name = f"{', '.join(action.option_strings)} {values}".strip()
        text = formatter._expand_help(action) if action.help else ""
        if action.required and action.option_strings:
            text = f"{text} (required)".strip()
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in text:
            text = f"{text} (default `{str(action.default).removeprefix(f'{ROOT}/')}`)".strip()
        yield f"`{name}`", prose(text)


def _prose(text: str) -> Iterator[str]:
    """The paragraphs of a description after its first; indented ones and command lines are code."""
    for paragraph in filter(str.strip, text.split("\n\n")):
        lines = paragraph.strip("\n").rstrip().splitlines()
        if all(line.startswith(("    ", "python ")) for line in lines):
            yield "\n".join(["```text", *(line.removeprefix("    ") for line in lines), "```"])
        else:
            yield prose(paragraph)


def _block(parser: argparse.ArgumentParser, title: str, level: int = 3) -> list[str]:
    """Heading, description and arguments of a command, then its sub-commands."""
    first, _, rest = (parser.description or "").strip("\n").partition("\n\n")
    rows, common = list(_arguments(parser)), list(_arguments(make_parser("")))
    blocks = [f"{'#' * level} {title}", prose(first), *_prose(rest)]
    if set(common) <= set(rows):
        rows = [row for row in rows if row not in common]
        blocks.append("Takes the [options of a configuration](#options-of-a-configuration)" + (", and:" if rows else "."))
    if rows:
        blocks.append(table(("argument", "meaning"), rows))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, inner in action.choices.items():
                inner.description = inner.description or (helps.get(name) or "").capitalize() + "."
                blocks += _block(inner, f"{title} {name}", level + 1)
    return blocks


def _console_rows() -> Iterator[tuple[str, str]]:
    for words, command in COMMANDS.items():
        yield f"`linear-neox {' '.join(words)}`", f"`python {' '.join(command)}`"


def _measure_rows() -> Iterator[tuple[str, str]]:
    """Commands of tools/bench with the first line of their docstring."""
    for path in sorted((ROOT / _MEASURE).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '"__main__"' in text:
            yield f"`{_MEASURE}/{path.name}`", text.split('"""')[1].strip().splitlines()[0]


def _neox_rows() -> Iterator[tuple[str, str]]:
    """GPT-NeoX's commands under tools/ckpts and what becomes of each."""
    for name, function in LEADS.items():
        yield f"`tools/ckpts/{name}.py`", (function.__doc__ or "").partition(": ")[2].partition("\n")[0] or "Runs ours."
    for name, hint in POINTERS.items():
        yield f"`tools/ckpts/{name}.py`", f"Ends with this message: {hint}"


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    intro = (
        "Every command prints its help with `--help`. In a checkout they run as `python COMMAND`; after `pip install` as "
        "`linear-neox WORDS` in any folder."
    )
    blocks = [intro, "## The console command", table(("installed", "in a checkout"), _console_rows())]
    blocks += ["## Options of a configuration", "Of `deepy.py`, `train.py`, `generate.py` and `eval.py`."]
    blocks.append(table(("argument", "meaning"), _arguments(make_parser(""))))
    for title, scripts in groups().items():
        blocks.append(f"## {title}")
        for script in scripts:
            blocks += _block(parser_of(script), f"`{script}`")
    blocks += ["## GPT-NeoX's tools", table(("command", "what it does"), _neox_rows())]
    blocks += ["## Measurements", table(("command", "what it measures"), _measure_rows())]
    return {"reference/commands.md": page("Commands", "the commands' own parsers", *blocks)}
