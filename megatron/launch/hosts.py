"""Hosts of a job: the host file, `include`/`exclude`, counts. DeepSpeed's grammar, with errors that name file and line.

The host file is read before anything starts. So batch sizes and mesh are checked against the real number of processes, and a
typo in the file is an error message instead of a traceback of the launcher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import ConfigError, LaunchError
from megatron.launch.shell_safety import is_host

Hosts = dict[str, tuple[int, ...]]  # host -> its slots (devices) with a process each, in rank order


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """Parse a host file.

    Args:
        text: its content.
        name: the file, for messages.

    Returns:
        Host -> number of slots, in file order.

    Raises:
        LaunchError: a line is not `host slots=N`, a host is listed twice, or there is no host.
    """
    slots_of: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)(\s.*)?", line)
        if not match or int(match.group(2)) == 0:
            raise LaunchError(
                f"'{line}' is not a line of a host file", where=f"{name}:{number}", hint="one `worker-0 slots=8` per line"
            )
        if not is_host(match.group(1)):
            raise LaunchError(
                f"{match.group(1)!r} is not a host name", where=f"{name}:{number}", hint="letters, digits, . - _ :"
            )
        if match.group(1) in slots_of:
            raise LaunchError(f"host {match.group(1)} is listed twice", where=f"{name}:{number}", hint="add up its slots")
        slots_of[match.group(1)] = int(match.group(2))
    if not slots_of:
        raise LaunchError("the host file names no host", where=name, hint="one `worker-0 slots=8` per line")
    return slots_of


def read_hostfile(path: str) -> dict[str, int]:
    """Read and parse a host file.

    Raises:
        LaunchError: it cannot be read or is invalid.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cannot read the host file {path}", why=str(error), hint="hostfile: path of the file") from error
    return parse_hostfile(text, path)


def find_pool(configured: str | None, defaults: Sequence[str | None] = ()) -> tuple[dict[str, int] | None, str]:
    """Find the host file.

    A missing file means this machine alone, as in DeepSpeed and GPT-NeoX, whose published YAMLs name a host file that exists
    on nobody's machine.

    Args:
        configured: host file of the configuration.
        defaults: files that are read without being configured; the first that exists.

    Returns:
        (host -> slots, or None for this machine alone; a warning if the configured file does not exist).

    Raises:
        LaunchError: an existing file cannot be read or is invalid.
    """
    existing = [path for path in (configured, *defaults) if path and Path(path).exists()]
    if configured and configured not in existing:
        return None, f"there is no host file {configured}: the run uses this machine alone"
    return (read_hostfile(existing[0]) if existing else None), ""


def _filter(text: str, pool: Mapping[str, int], key: str) -> Hosts:
    """`a@b:0,2` -> {a: all its slots, b: (0, 2)}."""
    selected: Hosts = {}
    for item in text.split("@"):
        host, colon, slots = item.strip().partition(":")
        if host not in pool:
            raise ConfigError(f"{key}: host '{host}' is not in the host file", hint="hosts there: " + ", ".join(pool))
        if colon and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise ConfigError(f"{key}: '{item}' is not host:slot,slot", hint="for example node1:0,1@node2")
        indices = {int(word) for word in slots.split(",")} if colon else set(range(pool[host]))
        if missing := sorted(indices - set(range(pool[host]))):
            raise ConfigError(f"{key}: {host} has no slot {missing[0]}", why=f"its slots are 0 to {pool[host] - 1}")
        selected[host] = tuple(sorted(indices | set(selected.get(host, ()))))
    return selected


def choose_hosts(
    pool: Mapping[str, int], *, include: str | None, exclude: str | None, num_nodes: int, num_gpus: int | None
) -> Hosts:
    """Apply the filters to `pool`.

    Args:
        pool: host -> number of slots.
        include: hosts and slots to use.
        exclude: hosts and slots to leave out.
        num_nodes: number of hosts; -1 is all.
        num_gpus: slots per host; None is all.

    Returns:
        The remaining hosts and slots, in the order of `pool`.

    Raises:
        ConfigError: filters contradict each other, name unknown hosts or slots, or leave nothing.
    """
    if include and exclude:
        raise ConfigError("include and exclude contradict each other", hint="give one of them")
    all_hosts = {host: tuple(range(slots)) for host, slots in pool.items()}
    if include:
        included = _filter(include, pool, "include")
        selected = {host: included[host] for host in pool if host in included}
    elif exclude:
        excluded = _filter(exclude, pool, "exclude")
        selected = {host: tuple(s for s in slots if s not in excluded.get(host, ())) for host, slots in all_hosts.items()}
    else:
        selected = all_hosts
        if num_nodes > len(pool):
            raise ConfigError(f"num_nodes {num_nodes} is more than the {len(pool)} hosts of the host file")
        if num_nodes > 0:
            selected = dict(list(all_hosts.items())[:num_nodes])
        if num_gpus:
            if small := [host for host in selected if pool[host] < num_gpus]:
                raise ConfigError(f"num_gpus {num_gpus} is more than the {pool[small[0]]} slots of {small[0]}")
            selected = {host: slots[:num_gpus] for host, slots in selected.items()}
    selected = {host: slots for host, slots in selected.items() if slots}
    if not selected:
        raise ConfigError("exclude leaves no host")
    return selected


def hostfile_text(hosts: Hosts) -> str:
    """The content of an equivalent host file."""
    return "".join(f"{host} slots={len(slots)}\n" for host, slots in hosts.items())
