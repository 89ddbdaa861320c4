"""Every launcher for real: two hosts with sshd, pdsh, mpirun and torchrun between them, and a Slurm; losses as of one process.

The hosts are network namespaces (`lab.py`); where the machine forbids them, or a program is absent, the tests skip and say why.
Losses are compared to 1e-5 relative: fp32 sums in another order, over ten steps, of numbers near 5.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import run_here
from tests.launch.failures_count import measure
from tests.launch.lab import ROOT, OneNodeSlurm, TwoHosts, clean_environment, finish, missing, scratch_folder, start
from tests.launch.tiny_run import STEPS, write_run
from tests.parallel.rank_server import free_port
from tests.tiny_run import losses

pytestmark = pytest.mark.slow
LIMIT_S = 200
SECRET = "do-not-show-this"
MULTI = ("ip", "sshd", "ssh", "pdsh", "mpirun", "unshare")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with scratch_folder("lnx-launch-") as made:
        yield made


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return write_run(folder / "data")


@pytest.fixture(scope="module")
def expected(config: Path, folder: Path) -> dict[int, float]:
    """Losses of one process over twice the steps; the runs below take the first or the second half."""
    done = run_here("train.py", config, "--set", f"run_dir={folder}/one", "--set", f"train_iters={2 * STEPS}")
    assert done.returncode == 0, done.stderr
    return losses(folder / "one")


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[TwoHosts]:
    if why := missing(*MULTI):
        pytest.skip(why)
    made = TwoHosts(folder / "hosts")
    yield made
    made.close()


@pytest.fixture(scope="module")
def slurm(folder: Path) -> Iterator[OneNodeSlurm]:
    if why := missing("slurmctld", "slurmd", "munged", "srun", "sbatch"):
        pytest.skip(why)
    made = OneNodeSlurm(folder / "slurm")
    yield made
    made.close()


def settings(name: str, folder: Path, **values: object) -> list[str]:
    known = {"run_dir": folder / name, "save": folder / name / "checkpoints", "master_port": free_port(), **values}
    return [word for key, value in known.items() for word in ("--set", f"{key}={value}")]


def compare(run_dir: Path, expected: dict[int, float], first: int = 1) -> None:
    found = losses(run_dir)
    assert sorted(found) == list(range(first, first + STEPS))
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), (step, found)


def run_inside(hosts: TwoHosts, folder: Path, name: str, *command: str) -> str:
    """Run a command on the first host to its end; nothing of it may be left on either."""
    log, built = folder / f"{name}.log", folder / "extensions"
    for op in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):  # locks that builds killed long ago have left
        (built / "py311_cpu" / op).mkdir(parents=True, exist_ok=True)
        (built / "py311_cpu" / op / "lock").touch()
    env = hosts.environment(TORCH_EXTENSIONS_DIR=str(built), WANDB_API_KEY=SECRET, MLFLOW_TRACKING_TOKEN=SECRET)
    process = start([*hosts.inside(hosts.names[0]), *command], env, log)
    code, text = finish(process, log, LIMIT_S)
    assert code == 0, text[-6000:]
    written = [
        path.read_text() for path in (folder / name).rglob("*") if path.suffix in ("", ".txt", ".yml") and path.is_file()
    ]
    assert written
    assert all(SECRET not in part for part in (text, *written))
    assert [hosts.pids(host) for host in hosts.names] == [{}, {}]
    return text


def hostfile(hosts: TwoHosts, folder: Path, slots: int) -> str:
    path = folder / f"hostfile{slots}"
    path.write_text("".join(f"{name} slots={slots}\n" for name in hosts.names))
    return str(path)


def test_pdsh_pipeline_over_two_hosts(hosts: TwoHosts, folder: Path, config: Path, expected: dict[int, float]) -> None:
    more = settings("pdsh", folder, hostfile=hostfile(hosts, folder, 1), pipe_parallel_size=2)
    more += ["--set", 'attention_config=[[["metala"],2]]', "--set", 'wandb_run_name=a $b (c) "d"']  # through a remote shell
    run_inside(hosts, folder, "pdsh", sys.executable, "deepy.py", "train.py", str(config), *more)
    compare(folder / "pdsh", expected)
    assert f"TORCH_EXTENSIONS_DIR={folder}" in (folder / "pdsh/launch/environment").read_text(), "locks were in the way"


def test_pdsh_four_ranks_go_on_from_the_checkpoint_of_two(
    hosts: TwoHosts, folder: Path, config: Path, expected: dict[int, float]
) -> None:
    load = folder / "pdsh" / "checkpoints"
    assert load.is_dir(), "the test before has written it"
    more = settings("pdsh4", folder, hostfile=hostfile(hosts, folder, 2), pipe_parallel_size=2, model_parallel_size=2)
    more += ["--set", f"load={load}", "--set", f"train_iters={2 * STEPS}"]
    run_inside(hosts, folder, "pdsh4", sys.executable, "deepy.py", "train.py", str(config), *more)
    compare(folder / "pdsh4", expected, first=STEPS + 1)


def test_openmpi_runner(hosts: TwoHosts, folder: Path, config: Path, expected: dict[int, float]) -> None:
    network = f"--mca btl_tcp_if_include {hosts.link} --mca oob_tcp_if_include {hosts.link} --allow-run-as-root"
    more = settings("openmpi", folder, hostfile=hostfile(hosts, folder, 1), model_parallel_size=2, launcher="openmpi")
    more += ["--set", f"launcher_args={network}"]
    run_inside(hosts, folder, "openmpi", sys.executable, "deepy.py", "train.py", str(config), *more)
    compare(folder / "openmpi", expected)


def test_mpirun_asks_mpi4py_for_the_address(hosts: TwoHosts, folder: Path, config: Path, expected: dict[int, float]) -> None:
    pytest.importorskip("mpi4py")
    more = settings("mpirun", folder, pipe_parallel_size=2)
    mpirun = ["mpirun", "-n", "2", "-host", ",".join(hosts.names), "--allow-run-as-root", "--bind-to", "none"]
    for layer in ("btl", "oob"):
        mpirun += ["--mca", f"{layer}_tcp_if_include", hosts.link]
    mpirun += ["-x", "PATH", "-x", "OMP_NUM_THREADS"]
    run_inside(hosts, folder, "mpirun", *mpirun, sys.executable, "train.py", str(config), *more)
    compare(folder / "mpirun", expected)


def test_torchrun_on_two_nodes(hosts: TwoHosts, folder: Path, config: Path, expected: dict[int, float]) -> None:
    """`deepy.py` with launcher torchrun, the same command on both hosts; data parallel over the link."""
    more = settings("torchrun", folder, launcher="torchrun", num_nodes=2, num_gpus=1, master_addr=hosts.names[0])
    command = [sys.executable, "deepy.py", "train.py", str(config), *more]
    logs = [folder / f"torchrun{i}.log" for i in (0, 1)]
    both = [
        start([*hosts.inside(name), *command], hosts.environment(), log) for name, log in zip(hosts.names, logs, strict=True)
    ]
    for process, log in zip(both, logs, strict=True):
        code, text = finish(process, log, LIMIT_S)
        assert code == 0, text[-6000:]
    compare(folder / "torchrun", expected)
    assert [hosts.pids(host) for host in hosts.names] == [{}, {}]


def test_an_unreachable_host_is_named_before_anything_starts(hosts: TwoHosts, folder: Path, config: Path) -> None:
    path = folder / "hostfile-bad"
    path.write_text(f"{hosts.names[0]} slots=1\nnowhere slots=1\n")
    log = folder / "bad.log"
    command = [sys.executable, "deepy.py", "train.py", str(config), *settings("bad", folder, hostfile=path)]
    code, text = finish(start([*hosts.inside(hosts.names[0]), *command], hosts.environment(), log), log, 60)
    assert code == 5
    assert "1 of 2 hosts cannot be reached: nowhere" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("fault", ["kill", "cut"])
def test_a_failure_ends_all_ranks_on_all_hosts(fault: str, hosts: TwoHosts, folder: Path) -> None:
    """The other faults, and the times, are `tests/launch/failures_count.py`'s."""
    found = measure(hosts, folder / "faults", fault)
    assert found["exit_code"] == 22
    assert found["no_process_left_s"] < 30
    words = "\n".join(found["last_words"])
    assert ("watchdog of rank 0, hang_timeout 5 s: lost: rank 1" if fault == "cut" else "rank 1 is lost") in words


def test_srun_through_deepy(slurm: OneNodeSlurm, folder: Path, config: Path, expected: dict[int, float]) -> None:
    more = settings("srun", folder, launcher="slurm", num_gpus=2, model_parallel_size=2)
    log = folder / "srun.log"
    command = [sys.executable, "deepy.py", "train.py", str(config), *more]
    code, text = finish(start(command, slurm.environment(), log), log, LIMIT_S)
    assert code == 0, text[-6000:]
    compare(folder / "srun", expected)


def test_sbatch_of_the_written_job_file(slurm: OneNodeSlurm, folder: Path, config: Path, expected: dict[int, float]) -> None:
    """Slurm's own parser reads the options, also a folder's name with all that it could stumble over."""
    name = """sbatch 'a' "b" $(c) %j#"""
    comment = 'a "c" \\ d # e'
    more = settings(
        name, folder, num_gpus=2, num_nodes=1, pipe_parallel_size=2, comment=json.dumps(comment), time_limit="10:00"
    )
    (folder / name / "logs").mkdir(parents=True)
    command = [sys.executable, "deepy.py", "train.py", str(config), *more, "--print-job", "slurm", "--cpu"]
    text = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True).stdout
    (folder / "job.sbatch").write_text(text)
    log = folder / "sbatch.log"
    code, said = finish(start(["sbatch", "--wait", str(folder / "job.sbatch")], slurm.environment(), log), log, LIMIT_S)
    output = "".join(p.read_text() for p in (folder / name / "logs").glob("slurm-*.txt"))
    assert code == 0, said + output[-6000:]
    compare(folder / name, expected)
    asked = ["scontrol", "show", "job", "-o"]
    job = subprocess.run(asked, env=slurm.environment(), capture_output=True, text=True, check=True).stdout
    for part in ("TimeLimit=00:20:00", "CPUs/Task=1", f"Comment={comment}", "NumTasks=2"):
        assert part in job, job
