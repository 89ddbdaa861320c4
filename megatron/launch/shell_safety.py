"""Checks configuration values that reach commands of DeepSpeed's runners, which build shell strings with little quoting.

pdsh joins its words with blanks, replaces `%h`, `%u`, `%n` and `%%`, and passes them to a shell on each host; the first word
that is not one of its options starts that command. mpirun and srun take the first such word as the program to start, and
mpirun passes its options to a shell on each host. So addresses, hosts and launcher arguments must be plain words (srun's may
be any), and arbitrary text is quoted for that shell.
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
    """Whether ssh and pdsh would take the name as a host, and as nothing else."""
    return bool(_HOST.fullmatch(name))


def check_address(address: str | None) -> None:
    """Check `master_addr`, which appears on command lines of launchers and hosts.

    Raises:
        ConfigError: it is not a host name or an IP address.
    """
    if address and not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"master_addr {address!r} is not an address", why="a name or IP address has letters, digits and . : - _ only"
        )


def check_place(path: str, label: str) -> None:
    """Check a path that pdsh's command on the hosts contains unquoted.

    Args:
        path: the path.
        label: what it is, for the message.

    Raises:
        LaunchError: a shell would not take `path` as one word.
    """
    if not _PLAIN.fullmatch(path):
        raise LaunchError(
            f"{label} {path!r} cannot be reached over pdsh",
            why="DeepSpeed's runner does not quote it for the shells of the hosts",
            hint="use a path without blanks and special characters, or launcher: torchrun",
        )


def launcher_words(text: str, launcher: str) -> list[str]:
    """The words of `launcher_args`, which must all be options of the launcher.

    Raises:
        ConfigError: a word is not an option, or has characters that a shell would interpret.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"launcher_args {text!r} cannot be split into words", why=str(error)) from error
    for word in words if launcher not in ("slurm", "srun") else ():
        if not _PLAIN.fullmatch(word):
            raise ConfigError(f"launcher_args: {word!r} has characters that a shell would interpret", where=f"of {text!r}")
    if launcher == "pdsh":
        _check_pdsh(words)
    elif words and not words[0].startswith("-"):
        raise ConfigError(f"launcher_args: {launcher} would start {words[0]!r}", why="the first word is not an option")
    return words


def _check_pdsh(words: Sequence[str]) -> None:
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word in _PDSH_VALUES and remaining and not remaining[0].startswith("-"):
            remaining.pop(0)
        elif word not in _PDSH_FLAGS and not (word[:2] in _PDSH_VALUES and len(word) > 2):
            options = " ".join((*_PDSH_FLAGS, *(f"{option} VALUE" for option in _PDSH_VALUES)))
            raise ConfigError(
                f"launcher_args: pdsh would not take {word!r} as one of its options",
                why="the first other word starts the command on the hosts",
                hint=f"allowed are {options}",
            )


def for_pdsh(words: Iterable[str]) -> list[str]:
    """Quote words so that they pass pdsh, DeepSpeed's runner and the remote shell unchanged.

    The runner puts double quotes around words with blanks, a backslash before double quotes in them, and leaves other words
    unquoted.
    """
    quoted = (re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word) for word in words)
    return [word.replace("%", "%%") for word in quoted]
