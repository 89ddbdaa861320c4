"""Two hosts on one machine, and a Slurm of one node: network namespaces with real sshd, real slurmctld and slurmd.

Everything lies in a scratch folder and in namespaces named after this process; `close` ends what was started, by process id.
Shared by the tests and by `tests/launch/failures_count.py` and `tools/bench/startup.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV_BIN = str(Path(sys.executable).parent)
_SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing(*programs: str) -> str:
    """Why namespaces or programs cannot be used here; empty when they can."""
    if os.geteuid() != 0:
        return "not root: no network namespaces"
    absent = [name for name in programs if not shutil.which(name, path=_SYSTEM)]
    if absent:
        return "not installed: " + ", ".join(absent)
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are forbidden here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class TwoHosts:
    """Hosts `<prefix>a` (10.77.0.1) and `<prefix>b` (10.77.0.2), joined by one link; ssh between them needs no password."""

    def __init__(self, folder: Path) -> None:
        self.folder, prefix = folder, f"h{os.getpid() % 100000}"
        self.names = (f"{prefix}a", f"{prefix}b")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self.link = "vth0"
        self.path = f"{folder}/bin:{VENV_BIN}:{_SYSTEM}"
        (folder / "bin").mkdir(parents=True)
        self._keys()
        try:
            self._network()
            for name in self.names:
                self._sshd(name)
        except BaseException:
            self.close()
            raise

    def _keys(self) -> None:
        f = self.folder
        os.chmod(f, 0o700)
        for name in ("id", *self.names):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(f / name))
        shutil.copy(f / "id.pub", f / "authorized_keys")
        (f / "ssh_config").write_text(
            f"Host *\n  IdentityFile {f}/id\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        # First on PATH, so that nothing of the user's ~/.ssh is read or written.
        (f / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {f}/ssh_config "$@"\n')
        (f / "bin" / "ssh").chmod(0o755)

    def _network(self) -> None:
        a, b = self.names
        hosts = "127.0.0.1 localhost\n" + "".join(f"{ip} {n}\n" for ip, n in zip(self.addresses, self.names, strict=True))
        for name in self.names:
            run("ip", "netns", "add", name)
            Path(f"/etc/netns/{name}").mkdir(parents=True, exist_ok=True)
            Path(f"/etc/netns/{name}/hosts").write_text(hosts)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", self.link, "netns", a, "type", "veth", "peer", "name", self.link, "netns", b)
        for name, address in zip(self.names, self.addresses, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", self.link)
        self.set_link(True)

    def set_link(self, up: bool) -> None:
        """Connect or cut the two hosts."""
        for name in self.names:
            run("ip", "-n", name, "link", "set", self.link, "up" if up else "down")

    def _sshd(self, name: str) -> None:
        f = self.folder
        Path("/run/sshd").mkdir(exist_ok=True)
        (f / f"sshd_{name}.conf").write_text(
            f"Port 22\nHostKey {f}/{name}\nAuthorizedKeysFile {f}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n"
            f"ClientAliveInterval 5\nClientAliveCountMax 2\nPidFile {f}/sshd_{name}.pid\nSetEnv PATH={self.path}\n"
        )
        run(*self.inside(name), "/usr/sbin/sshd", "-f", f"{f}/sshd_{name}.conf", "-E", f"{f}/sshd_{name}.log")

    def inside(self, name: str) -> tuple[str, ...]:
        """The beginning of a command that runs on host `name`, which is then also its host name."""
        return ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name)

    def environment(self, **more: str) -> dict[str, str]:
        """For commands inside: a clean shell that finds our ssh and the virtual environment."""
        return clean_environment(PATH=self.path, **more)

    def pids(self, name: str, *, sshd: bool = False) -> dict[int, str]:
        """Processes of host `name` but sshd's: id -> command line."""
        found = {}
        for word in run("ip", "netns", "pids", name).split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{word}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if line and (sshd or not line.startswith(("sshd:", "/usr/sbin/sshd"))):
                    found[int(word)] = line
        return found

    def close(self) -> None:
        """End every process in the namespaces and remove them."""
        for name in self.names:
            with contextlib.suppress(AssertionError):
                for pid in self.pids(name, sshd=True):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a new shell: what a launcher must bring itself is not inherited."""
    kept = {k: os.environ[k] for k in ("HOME", "LANG", "TMPDIR", "USER") if k in os.environ}
    return {**kept, "PATH": f"{VENV_BIN}:{_SYSTEM}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


class OneNodeSlurm:
    """munged, slurmctld and slurmd of a cluster of one node with eight slots, on ports and sockets of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", "spool"):
            (folder / name).mkdir(exist_ok=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.conf = folder / "slurm.conf"
        port = 20000 + os.getpid() % 20000
        self.conf.write_text(_slurm_conf(folder, port), encoding="utf-8")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        f = self.folder
        (f / "munge.key").write_bytes(os.urandom(128))
        (f / "munge.key").chmod(0o400)
        munge = ("munged", "--foreground", "--force", f"--key-file={f}/munge.key", f"--socket={f}/munge.sock")
        self._daemon("munged", *munge, f"--pid-file={f}/munge.pid", f"--log-file={f}/munge.log", f"--seed-file={f}/munge.seed")
        self._until(lambda: (f / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self._daemon("slurmd", "slurmd", "-D", "-N", "vm", "-f", str(self.conf))
        self._until(lambda: "idle" in self.sinfo(), "slurmd")

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "wb") as out:
            self._processes.append(
                subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment())
            )

    def _until(self, ready: object, what: str) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if ready():  # type: ignore[operator]
                return
            time.sleep(0.1)
        logs = "\n".join(p.read_text(errors="replace")[-1000:] for p in self.folder.glob("*.out"))
        raise AssertionError(f"{what} did not start:\n{logs}")

    def sinfo(self) -> str:
        """State of the node."""
        done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=self.environment(), capture_output=True, text=True, check=False)
        return done.stdout

    def environment(self, **more: str) -> dict[str, str]:
        """For srun and sbatch."""
        return clean_environment(SLURM_CONF=str(self.conf), **more)

    def close(self) -> None:
        """End the daemons, and job steps that are left."""
        subprocess.run(
            ["scancel", "--full", "--user=root"], env=self.environment(), capture_output=True, check=False, timeout=20
        )
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _slurm_conf(folder: Path, port: int) -> str:
    values = {
        "ClusterName": "lab",
        "SlurmctldHost": "vm(127.0.0.1)",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.sock",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool",
        "SlurmctldPidFile": f"{folder}/ctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.pid",
        "SlurmctldPort": port,
        "SlurmdPort": port + 1,
        "SlurmctldLogFile": f"{folder}/ctld.log",
        "SlurmdLogFile": f"{folder}/slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "KillWait": 5,
        "SlurmdParameters": "config_overrides",
    }
    node = "NodeName=vm NodeAddr=127.0.0.1 CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000"
    partition = "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES"
    return "\n".join([*(f"{k}={v}" for k, v in values.items()), node, partition, ""])


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A short path of its own: sockets of munge may have 108 characters at most."""
    folder = Path(tempfile.mkdtemp(prefix=name, dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
    """A command in the background in a process group of its own, its output in `log`."""
    with open(log, "wb") as out:
        return subprocess.Popen(
            command,
            env=dict(env),
            cwd=cwd,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path, timeout: float) -> tuple[int, str]:
    """(exit code, output); what runs longer is killed with its group and fails."""
    try:
        code = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"no end in {timeout} s:\n{log.read_text(errors='replace')[-6000:]}") from None
    return code, log.read_text(errors="replace")
