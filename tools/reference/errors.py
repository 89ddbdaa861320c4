"""Pages of the error messages, one per class of error, and the page of exit codes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from megatron import errors
from megatron.planning.dry_run import DOES_NOT_FIT
from megatron.reliability.heartbeat import EXIT_HANG, EXIT_LOST
from megatron.reliability.stop import EXIT_SAVED, EXIT_UNSAVED
from tools.reference.markdown import page, table
from tools.reference.messages import CLASSES, Message, messages

FOLDER = "reference/errors"
SOURCE = "the source's error messages"
# class -> file name and title of its page; a subclass without a page is on that of its base
PAGES: dict[type[errors.UserError], tuple[str, str]] = {
    errors.ConfigError: ("configuration", "Configuration"),
    errors.DataError: ("data", "Data"),
    errors.CheckpointError: ("checkpoint", "Checkpoints"),
    errors.LaunchError: ("launch", "Launching"),
    errors.ExportError: ("export", "Export and import"),
    errors.TrainingError: ("training", "Training"),
    errors.UserError: ("other", "Other"),
}
_RESTART = "run the same command again; it resumes"
# Codes of a process that are not those of a class: code -> meaning, and what to do.
CODES: dict[int, tuple[str, str]] = {
    0: ("Finished.", ""),
    1: ("A defect, with a traceback; or a `UserError` of no other class.", "report it"),
    2: ("", "correct the YAML or the command line; argparse uses this code too"),
    3: ("", "correct the corpus or the tokenizer; also: the disk of stdout is full"),
    4: ("", "name another checkpoint; `tools/checkpoint.py verify` reports damage"),
    5: ("", "see the message of the rank; also: another run holds the save folder"),
    6: ("", "see the message"),
    7: ("", "look at the named samples and the learning rate"),
    DOES_NOT_FIT: ("A dry run does not fit into the given memory.", "see the suggestion at the end of its output"),
    EXIT_HANG: ("A rank made no progress for `hang_timeout` seconds.", f"see the watchdog's report; {_RESTART}"),
    EXIT_LOST: ("A rank was lost: its process died, stopped responding, or failed.", f"see its message; {_RESTART}"),
    EXIT_SAVED: ("Stopped by a signal or `time_limit`; a checkpoint was saved.", _RESTART),
    EXIT_UNSAVED: ("Stopped by a signal or `time_limit` without a `save` folder.", "set `save`"),
    130: ("Interrupted (Ctrl-C) before a command could handle it.", ""),
    137: ("A process was killed by signal 9, often for its memory; 128 + n is signal n.", "resume from the last checkpoint"),
}


def _escaped(text: str) -> str:
    """A template as Markdown: placeholders in italics, nothing else with a meaning, code stays code."""
    marked = []
    for part in re.split(r"(`[^`]*`|\{[\w. ]+\})", " ".join(text.split())):
        if part.startswith("`") and len(part) > 1:
            marked.append(part)
        else:
            plain = re.sub(r"([\\*_\[\]#|`])", r"\\\1", part).replace("<", "&lt;")
            marked.append(f"*{plain[1:-1]}*" if part.startswith("{") and part.endswith("}") else plain)
    return "".join(marked)


def _entry(message: Message) -> str:
    lines = ["- " + " / ".join(map(_escaped, message.what))]
    for label, texts in (("why", message.why), ("try", message.hint)):
        if texts:
            lines.append(f"  **{label}:** " + "; or: ".join(map(_escaped, texts)))
    return "<br>\n".join(lines)


def _summary(cls: type) -> str:
    """First line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _home(cls: type) -> type[errors.UserError]:
    """The class whose page has the messages of `cls`."""
    return next(base for base in cls.__mro__ if base in PAGES)


def _class_page(cls: type[errors.UserError], entries: Sequence[Message]) -> str:
    title = PAGES[cls][1]
    names = sorted({m.cls for m in entries} | {cls.__name__})
    intro = [f"`{name}`, exit code {CLASSES[name].exit_code}: {_summary(CLASSES[name])}" for name in names]
    by_file: dict[str, list[str]] = {}
    for message in entries:
        by_file.setdefault(message.file, []).append(_entry(message))
    sections = [part for file, texts in by_file.items() for part in (f"## `{file}`", "\n".join(dict.fromkeys(texts)))]
    note = "Words in italics are filled in. Lines `where` (file and line, path, rank or step) are left out here."
    return page(f"Errors: {title}", SOURCE, *intro, note, *sections)


def _index(entries: Sequence[Message]) -> str:
    rows = []
    for cls, (name, title) in PAGES.items():
        count = sum(_home(CLASSES[m.cls]) is cls for m in entries)
        rows.append((f"[{title}]({name}.md)", f"`{cls.__name__}`", str(cls.exit_code), str(count)))
    intro = (
        "A user's mistake ends in one message and an exit code, never in a traceback. The first line says what is wrong; lines "
        "`where`, `why` and `try` follow. Several mistakes of one configuration are listed together. A traceback is a defect: "
        "please report it."
    )
    example = "```text\nerror: unknown key train_itres\n  where: configs/mine.yml:12\n  try: did you mean 'train_iters'?\n```"
    return page("Error messages", SOURCE, intro, example, table(("page", "class", "exit code", "messages"), rows))


def exit_code_page() -> str:
    """The page of exit codes."""
    meanings = {cls.exit_code: _summary(cls) for cls in PAGES if cls is not errors.UserError}
    rows = []
    for code, (meaning, remedy) in CODES.items():
        name = next((f" ([messages](errors/{file}.md))" for cls, (file, _) in PAGES.items() if cls.exit_code == code), "")
        rows.append((str(code), (meaning or meanings[code]) + name, remedy[:1].upper() + remedy[1:]))
    note = (
        "A scheduler may restart a job after 21, 22 and 75 unconditionally. `deepy.py` returns the code of the ranks; "
        "`torchrun` returns its own. [Reliability](../reliability.md) describes what happens before each of them."
    )
    return page("Exit codes", "megatron/errors.py and megatron/reliability", table(("code", "meaning", "remedy"), rows), note)


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    entries = messages()
    texts = {f"{FOLDER}/index.md": _index(entries), "reference/exit-codes.md": exit_code_page()}
    for cls, (name, _) in PAGES.items():
        texts[f"{FOLDER}/{name}.md"] = _class_page(cls, [m for m in entries if _home(CLASSES[m.cls]) is cls])
    return texts
