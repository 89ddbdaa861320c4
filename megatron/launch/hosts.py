"""Hosts of a job: the host file, `include`/`exclude`, counts. DeepSpeed's grammar, with errors that name file and line.

Read here, before anything is started, so that batch sizes and mesh are checked against the true number of processes and a
typing error in a host file is a message instead of a traceback of the launcher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import ConfigError, LaunchError
from megatron.launch.shell_safety import is_host

Hosts = dict[str, tuple[int, ...]]  # host -> the slots (devices) that take a process, in order of rank


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """Host -> number of slots, in the order of the file. name: the file, for messages.

    Raises:
        LaunchError: a line that is no `host slots=N`, a host named twice, or no host at all.
    """
    found: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)(\s.*)?", line)
        if not match or int(match.group(2)) == 0:
            raise LaunchError(
                f"'{line}' is no line of a host file", where=f"{name}:{number}", hint="one `worker-0 slots=8` per line"
            )
        if not is_host(match.group(1)):
            raise LaunchError(
                f"{match.group(1)!r} is no name of a host", where=f"{name}:{number}", hint="letters, digits, . - _ :"
            )
        if match.group(1) in found:
            raise LaunchError(f"host {match.group(1)} is listed twice", where=f"{name}:{number}", hint="add up its slots")
        found[match.group(1)] = int(match.group(2))
    if not found:
        raise LaunchError("the host file names no host", where=name, hint="one `worker-0 slots=8` per line")
    return found


def read_hostfile(path: str) -> dict[str, int]:
    """`parse_hostfile` of a file.

    Raises:
        LaunchError: it cannot be read or is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cannot read the host file {path}", why=str(error), hint="hostfile: path of the file") from error
    return parse_hostfile(text, path)


def find_pool(asked: str | None, usual: Sequence[str | None] = ()) -> tuple[dict[str, int] | None, str]:
    """(host -> slots, or None for this machine alone; a warning where the file that is asked for does not exist).

    As DeepSpeed and with it GPT-NeoX do it, whose published YAMLs name a host file that exists on nobody's machine.

    Args:
        asked: host file of the configuration. usual: files that are read unasked where they exist, the first of them.

    Raises:
        LaunchError: a file that exists cannot be read or is wrong.
    """
    there = [path for path in (asked, *usual) if path and Path(path).exists()]
    if asked and asked not in there:
        return None, f"there is no host file {asked}: the run uses this machine alone"
    return (read_hostfile(there[0]) if there else None), ""


def _filter(text: str, pool: Mapping[str, int], key: str) -> Hosts:
    """`a@b:0,2` -> {a: all its slots, b: (0, 2)}."""
    chosen: Hosts = {}
    for item in text.split("@"):
        host, colon, slots = item.strip().partition(":")
        if host not in pool:
            raise ConfigError(f"{key}: host '{host}' is not in the host file", hint="hosts there: " + ", ".join(pool))
        if colon and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise ConfigError(f"{key}: '{item}' is no host:slot,slot", hint="for example node1:0,1@node2")
        wanted = {int(word) for word in slots.split(",")} if colon else set(range(pool[host]))
        if missing := sorted(wanted - set(range(pool[host]))):
            raise ConfigError(f"{key}: {host} has no slot {missing[0]}", why=f"its slots are 0 to {pool[host] - 1}")
        chosen[host] = tuple(sorted(wanted | set(chosen.get(host, ()))))
    return chosen


def choose_hosts(
    pool: Mapping[str, int], *, include: str | None, exclude: str | None, num_nodes: int, num_gpus: int | None
) -> Hosts:
    """What is left of `pool` after the filters, in its order; num_nodes -1: all hosts.

    Raises:
        ConfigError: filters contradict each other, name what is not there, or leave nothing.
    """
    if include and exclude:
        raise ConfigError("include and exclude contradict each other", hint="give one of them")
    every = {host: tuple(range(slots)) for host, slots in pool.items()}
    if include:
        picked = _filter(include, pool, "include")
        chosen = {host: picked[host] for host in pool if host in picked}
    elif exclude:
        out = _filter(exclude, pool, "exclude")
        chosen = {host: tuple(s for s in slots if s not in out.get(host, ())) for host, slots in every.items()}
    else:
        chosen = every
        if num_nodes > len(pool):
            raise ConfigError(f"num_nodes {num_nodes} is more than the {len(pool)} hosts of the host file")
        if num_nodes > 0:
            chosen = dict(list(every.items())[:num_nodes])
        if num_gpus:
            if small := [host for host in chosen if pool[host] < num_gpus]:
                raise ConfigError(f"num_gpus {num_gpus} is more than the {pool[small[0]]} slots of {small[0]}")
            chosen = {host: slots[:num_gpus] for host, slots in chosen.items()}
    chosen = {host: slots for host, slots in chosen.items() if slots}
    if not chosen:
        raise ConfigError("exclude leaves no host")
    return chosen


def hostfile_text(hosts: Hosts) -> str:
    """A host file that says the same."""
    return "".join(f"{host} slots={len(slots)}\n" for host, slots in hosts.items())
