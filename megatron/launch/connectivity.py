"""Before a job of several hosts: can they all be reached, and which address does the first one have.

DeepSpeed's runner tries the first host only, with a traceback; a host that is missing shows minutes later as ranks that do
not connect.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from megatron.errors import LaunchError

_LIMIT_S = 20.0
_SSH = ("ssh", "-o", "PasswordAuthentication=no", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def addresses(hosts: Sequence[str]) -> dict[str, str]:
    """Host -> its first address, asked of all hosts at once over ssh.

    Raises:
        LaunchError: hosts that do not answer, all of them named, with what ssh said.
    """
    try:
        asked = {h: subprocess.Popen((*_SSH, h, "hostname -I"), stdout=-1, stderr=-1, stdin=-3, text=True) for h in hosts}
    except OSError as error:
        raise LaunchError(
            "ssh cannot be started", why=str(error), hint="install an ssh client, or use launcher slurm"
        ) from error
    found: dict[str, str] = {}
    bad: dict[str, str] = {}
    for host, process in asked.items():
        try:
            out, err = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = "", f"no answer in {_LIMIT_S:g} s"
        if process.returncode == 0 and out.split():
            found[host] = out.split()[0]
        else:
            bad[host] = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    if bad:
        raise LaunchError(
            f"{len(bad)} of {len(hosts)} hosts cannot be reached: " + ", ".join(bad),
            why="; ".join(f"{host}: {text}" for host, text in bad.items()),
            hint="ssh to each without a password must work (ssh-copy-id); no_ssh_check: true skips this test",
        )
    return found
