"""What of a configuration may stand in a command of DeepSpeed's runners, which build shell strings and quote little of them.

pdsh joins its words with blanks, replaces `%h`, `%u`, `%n` and `%%` in them, and gives them to a shell on each host; the first
word that is no option of its own begins that command. mpirun and srun take the first such word for the program to start, and
mpirun hands its options on to a shell on each host. So addresses, hosts and launcher arguments must be plain words (srun's may
be any), and whatever may be anything is quoted for that shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from megatron.errors import ConfigError, LaunchError

_ADDRESS = re.compile(r"[A-Za-z0-9_\[][\w.:%\[\]-]*")  # names, IPv4, IPv6 with a zone
_HOST = re.compile(r"[A-Za-z0-9_][\w.:@-]*")  # as ssh takes it: user@host too
_PLAIN = re.compile(r"[\w@%+=:,./^-]+")
_PDSH_VALUES = ("-t", "-u", "-f", "-l", "-x")  # options of pdsh that take a value; not those that choose what is run, or where
_PDSH_FLAGS = ("-b", "-d", "-N", "-q")


def is_host(name: str) -> bool:
    """Whether ssh and pdsh would take the name for a host, and for nothing else."""
    return bool(_HOST.fullmatch(name))


def check_address(address: str | None) -> None:
    """`master_addr` stands on command lines of launchers and hosts.

    Raises:
        ConfigError: it is no name or number of a host.
    """
    if address and not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"master_addr {address!r} is no address", why="letters, digits and . : - _ make up a name or a number"
        )


def check_place(path: str, what: str) -> None:
    """pdsh's command on the hosts names the working folder and the interpreter as they are.

    Raises:
        LaunchError: a shell would not take `path` for one word.
    """
    if not _PLAIN.fullmatch(path):
        raise LaunchError(
            f"{what} {path!r} cannot be reached over pdsh",
            why="DeepSpeed's runner does not quote it for the shells of the hosts",
            hint="a path without blanks and special signs, or launcher: torchrun",
        )


def launcher_words(text: str, launcher: str) -> list[str]:
    """The words of `launcher_args`, options of the launcher one and all.

    Raises:
        ConfigError: one is not, or has signs that a shell would act upon.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"launcher_args {text!r} cannot be taken apart", why=str(error)) from error
    for word in words if launcher not in ("slurm", "srun") else ():
        if not _PLAIN.fullmatch(word):
            raise ConfigError(f"launcher_args: {word!r} has signs that a shell would act upon", where=f"of {text!r}")
    if launcher == "pdsh":
        _check_pdsh(words)
    elif words and not words[0].startswith("-"):
        raise ConfigError(f"launcher_args: {launcher} would start {words[0]!r}", why="it begins with no option")
    return words


def _check_pdsh(words: Sequence[str]) -> None:
    left = list(words)
    while left:
        word = left.pop(0)
        if word in _PDSH_VALUES and left and not left[0].startswith("-"):
            left.pop(0)
        elif word not in _PDSH_FLAGS and not (word[:2] in _PDSH_VALUES and len(word) > 2):
            known = " ".join((*_PDSH_FLAGS, *(f"{option} VALUE" for option in _PDSH_VALUES)))
            raise ConfigError(
                f"launcher_args: pdsh would not take {word!r} for one of its options here",
                why="what is none begins the command of the hosts",
                hint=f"known are {known}",
            )


def for_pdsh(words: Iterable[str]) -> list[str]:
    """Words that arrive on the hosts as they are: past pdsh, DeepSpeed's runner and the shell.

    The runner puts double quotes around words with blanks, a backslash before double quotes in them, and leaves all others
    alone.
    """
    quoted = (re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word) for word in words)
    return [word.replace("%", "%%") for word in quoted]
