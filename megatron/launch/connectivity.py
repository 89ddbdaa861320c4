"""Checks before a job of several hosts starts: whether every host can be reached, and the address of the first one.

DeepSpeed's runner tries only the first host, and fails with a traceback; a missing host shows minutes later, as ranks that do
not connect.
"""

from __future__ import annotations

from collections.abc import Sequence
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

from megatron.errors import LaunchError

_LIMIT_S = 20.0
_SSH = ("ssh", "-o", "PasswordAuthentication=no", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def addresses(hosts: Sequence[str]) -> dict[str, str]:
    """Host -> its first address; all hosts are asked at once over ssh.

    Raises:
        LaunchError: hosts do not answer; it names all of them, with ssh's messages.
    """
    try:
        processes = {
            host: Popen((*_SSH, host, "hostname -I"), stdout=PIPE, stderr=PIPE, stdin=DEVNULL, text=True) for host in hosts
        }
    except OSError as error:
        raise LaunchError(
            "ssh cannot be started", why=str(error), hint="install an ssh client, or use launcher slurm"
        ) from error
    address_of: dict[str, str] = {}
    unreachable: dict[str, str] = {}
    for host, process in processes.items():
        try:
            out, err = process.communicate(timeout=_LIMIT_S)
        except TimeoutExpired:
            process.kill()
            out, err = "", f"no answer in {_LIMIT_S:g} s"
        if process.returncode == 0 and out.split():
            address_of[host] = out.split()[0]
        else:
            unreachable[host] = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    if unreachable:
        raise LaunchError(
            f"{len(unreachable)} of {len(hosts)} hosts cannot be reached: " + ", ".join(unreachable),
            why="; ".join(f"{host}: {text}" for host, text in unreachable.items()),
            hint="ssh to each without a password must work (ssh-copy-id); no_ssh_check: true skips this test",
        )
    return address_of
