"""Reads the shell blocks of pages without running them: each command of ours must name a script, flags and keys that exist.

A command line is parsed by its script's own argument parser, up to the point where the script would start to work. Its
configuration files are then read with its `--set` keys, which refuses unknown keys and wrong types.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.cli import overrides_from_args
from megatron.config.load import load_config
from megatron.config.yaml_reader import find_config
from megatron.errors import ConfigError
from tests.docs.blocks import ROOT, Block, Page
from tools.reference.command_parsers import stopped

_SEPARATORS = {"&&", "||", "|", ";", "&", "(", ")", "{", "}", "then", "do", "else", "if", "while", "!", "|&", "$("}
_REDIRECTION = re.compile(r"^\d*(>>?|<|>&|&>)$")
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_BEFORE = {"srun", "time", "nohup", "env", "exec", "timeout", "nice", "mpirun", "numactl"}
_PACKAGES = ("megatron", "linear_neox", "tests", "tools", "examples")
_READERS_OWN = re.compile(r"^(configs/)?mine\.yml$|^[A-Z]+$|^path/to/")
_BASE_CONFIG = "configs/metala-quickstart.yml"


@dataclass(frozen=True)
class Command:
    """A simple command: its line in the page, its words without redirections, and the files that it redirects to."""

    line: int
    words: tuple[str, ...]
    written: tuple[str, ...] = ()


def commands_of(block: Block) -> list[Command]:
    """All simple commands of a shell block.

    Raises:
        ValueError: a quote is not closed.
    """
    commands: list[Command] = []
    for line, text in _logical_lines(block):
        lexer = shlex.shlex(text.replace("$(", " ( "), posix=True, punctuation_chars="();<>|&")
        lexer.wordchars += "$[]{},:@%+!^"
        lexer.commenters = ""
        words, written, redirects = list[str](), list[str](), False
        for word in [*lexer, ";"]:
            if redirects:
                written.append(word)
                redirects = False
            elif _REDIRECTION.match(word) or word in ("<<", "<<<"):
                redirects = True
            elif word in _SEPARATORS or set(word) <= set("();|&"):
                if words or written:
                    commands.append(Command(line, tuple(words), tuple(written)))
                words, written = [], []
            else:
                words.append(word)
    return commands


def _logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """(number in the page, text): continued lines joined, comments and here-documents left out, prompts of consoles removed."""
    pending, start, end = "", 0, ""
    for number, text in enumerate(block.lines, block.line + 1):
        if end:
            end = "" if text.strip() == end else end
            continue
        if block.language == "console":
            if not pending and not text.startswith("$ "):
                continue
            text = text.removeprefix("$ ")
        start = start if pending else number
        pending += re.sub(r"(^|\s)#.*$", "", text)
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        with contextlib.suppress(ValueError):
            shlex.split(pending)
            if heredoc := _HEREDOC.search(pending):
                end = heredoc[2]
            yield start, pending
            pending = ""
            continue
        pending += "\n"  # an open quote: the text continues
    if pending:
        raise ValueError(f"line {start}: a quote is not closed")


def script_of(words: Sequence[str]) -> list[str] | None:
    """The script of ours and its arguments that a command runs, `make TARGET`, or None for other programs."""
    words = list(words)
    while words and (re.match(r"^\w+=", words[0]) or words[0] in _BEFORE or (words[0].startswith("-") and len(words) > 1)):
        words.pop(0)
    program = words[0].rpartition("/")[2] if words else ""
    if program == "torchrun":
        scripts = [index for index, word in enumerate(words) if word.endswith(".py")]
        return words[scripts[0] :] if scripts else None
    if program == "linear-neox":
        return words
    if program == "make":
        return words
    if program in ("python", "python3"):
        words.pop(0)
        while words and words[0] in ("-u", "-I"):
            words.pop(0)
        if words[:1] == ["-m"] and words[1].partition(".")[0] in _PACKAGES:
            return words
        if words and words[0].endswith(".py"):
            return words
    return words if program.endswith(".py") and program != words[0] else None


def our_commands(page: Page) -> list[tuple[Command, list[str]]]:
    """The commands of a page's shell blocks that run our scripts."""
    commands = [command for block in page.blocks if block.is_shell for command in commands_of(block)]
    return [(command, script) for command in commands if (script := script_of(command.words)) is not None]


def problems_of(page: Page) -> list[str]:
    """What is wrong with the commands of a page, one text each."""
    problems = []
    try:
        commands = our_commands(page)
    except ValueError as error:
        return [f"{page.name}: {error}"]
    created = _created_files(page)
    for command, script in commands:
        if problem := _problem([plain for word in script if (plain := _without_option_brackets(word))], created):
            problems.append(f"{page.name}:{command.line}: {problem}\n    {' '.join(command.words)}")
    return problems


def _without_option_brackets(word: str) -> str:
    """`[--private]` and `[--data FILE]` mean options that may be left out; a list such as `[a, b]` stays."""
    word = word.removeprefix("[") if word.startswith("[-") else word
    return word.removesuffix("]") if word.count("]") > word.count("[") else word


def _created_files(page: Page) -> set[str]:
    """Files that the page writes: redirections, arguments of cp, mv, tee and of --output, first comments of other blocks."""
    names: set[str] = set()
    for block in page.blocks:
        for command in commands_of(block) if block.is_shell else ():
            names.update(command.written)
            if command.words[:1] in (("cp",), ("mv",), ("tee",), ("sed",)):
                names.add(command.words[-1])
            outputs = [after for word, after in zip(command.words, command.words[1:], strict=False) if word.startswith("--out")]
            names.update(file for output in outputs for file in (output, f"{output}/continue.yml"))
            if script_of(command.words) == ["tools/layer.py", "new", command.words[-1]]:
                names.add(f"configs/{command.words[-1]}.yml")
        if not block.is_shell and block.lines and block.lines[0].startswith("# "):
            names.add(block.lines[0].removeprefix("# ").strip())
    return {name.removeprefix("./") for name in names}


def _problem(script: list[str], created: set[str]) -> str:
    """What is wrong with one command line; empty if nothing is."""
    if script[0] == "make":
        targets = {
            line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"^[\w-]+:", line)
        }
        unknown = [word for word in script[1:] if re.match(r"^[a-z][\w-]*$", word) and word not in targets]
        return f"the Makefile has no target {unknown[0]}" if unknown else ""
    if script[0] == "linear-neox":
        from linear_neox.cli import command_line

        if len(script) == 2 and script[1] in ("--help", "--version"):
            return ""
        resolved = command_line(script[1:])
        if resolved is None:
            return f"there is no command 'linear-neox {' '.join(script[1:3])}'"
        script = [str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word for word in resolved]
    if script[0] == "-m":
        path = ROOT / Path(*script[1].split("."))
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            return f"there is no module {script[1]}"
    elif not (ROOT / script[0]).is_file():
        return "" if script[0] in created else f"there is no script {script[0]}"
    if script[0] == "deepy.py":
        return _problem_of_deepy(script[1:], created)
    return _problem_of_arguments(tuple(script), frozenset(created))


def _problem_of_deepy(words: list[str], created: set[str]) -> str:
    """Of the launcher's own options, then of the script's."""
    from megatron.errors import LaunchError

    deepy = runpy.run_path(str(ROOT / "deepy.py"), run_name="deepy")
    if {"-h", "--help"} & set(words):
        return ""
    try:
        script, rest = deepy["_split"](
            [str(ROOT / word) if (ROOT / word).is_file() and word.endswith(".py") else word for word in words]
        )
    except LaunchError as error:
        return error.what
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        deepy["_parser"]().parse_known_intermixed_args([word for word in words if not script.endswith(word)])
    if errors.getvalue():
        return errors.getvalue().splitlines()[-1]
    return _problem_of_arguments((str(Path(script).name), *rest), frozenset(created))


@functools.cache
def _problem_of_arguments(script: tuple[str, ...], created: frozenset[str]) -> str:
    """Whether the script's parser takes the arguments, and its configuration the keys."""
    command = stopped(script, parse=True)
    outcome = command.arguments
    if outcome is None:
        return command.refusal
    if not hasattr(outcome, "overrides"):
        return ""
    files: list[str | Path] = []
    for name in outcome.conf_file:
        path = ROOT / find_config(
            ROOT / name if outcome.conf_dir is None and (ROOT / name).exists() else name, outcome.conf_dir
        )
        if path.is_file():
            files.append(path)
        elif {name, f"{name}.yml"} & created or _READERS_OWN.match(f"{outcome.conf_dir or ''}{name}"):
            files = [ROOT / _BASE_CONFIG]  # for the keys of --set; what the page writes is read when it runs
            break
        else:
            return f"there is no configuration {name}, and the page writes none"
    overrides, labels = overrides_from_args(outcome)
    try:
        load_config(files or [ROOT / _BASE_CONFIG], overrides=overrides, override_labels=labels, check=False)
    except ConfigError as error:
        return str(error)
    return ""
