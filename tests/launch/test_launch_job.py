"""Options and a machine give exactly one job; what is printed of it is kept in golden files (REGEN=1 rewrites them)."""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.errors import ConfigError, LaunchError
from megatron.launch.job import SUPERVISOR, Job, plan_job
from megatron.launch.options import LaunchOptions, Machine
from megatron.launch.preview import describe
from megatron.launch.runners import chosen_devices, rendezvous_port

CPU = Machine(devices=(), cores=8, python="/py")
GPU = Machine(devices=("0", "1", "2", "3"), cores=64, python="/py")
ARGS = ["-d", "configs", "a.yml", "--set", "train_iters=5"]
POOL = {"n1": 4, "n2": 4}
ENVIRON = {
    "PATH": "/venv/bin:/usr/bin",
    "NCCL_DEBUG": "WARN",
    "MY_FLAG": "1",
    "UNRELATED": "x",
    "WANDB_API_KEY": "do-not-show",
    "HF_TOKEN": "do-not-show",
    "NCCL_AUTH_TOKEN": "do-not-show",
    "MLFLOW_TRACKING_URI": "https://me:do-not-show@host",
}
GOLDEN = Path(__file__).with_name("golden")


def job(machine: Machine = CPU, pool: dict[str, int] | None = None, **options: Any) -> Job:
    known = {"port": 29500, "pool": pool, "environ": ENVIRON, "scratch": "runs/a/launch"}
    return plan_job(LaunchOptions(**options), machine, "train.py", ARGS, **known)


def check_golden(name: str, text: str) -> None:
    """Compare with the golden file; places of this checkout are taken out first."""
    text = text.replace(SUPERVISOR, "<supervisor>").replace(os.path.abspath("."), "<here>")
    path = GOLDEN / name
    if os.environ.get("REGEN"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


CASES: dict[str, tuple[Machine, dict[str, int] | None, dict[str, Any]]] = {
    "python": (CPU, None, {}),
    "none": (CPU, POOL, {"launcher": "none"}),
    "local-cpu": (CPU, None, {"pipe_parallel_size": 2, "model_parallel_size": 2}),
    "local-gpu": (GPU, None, {"include": "localhost:1,3"}),
    "pdsh": (GPU, POOL, {"hostfile": "hosts", "export_env": ("MY_FLAG",)}),
    "pdsh-slots": (GPU, POOL, {"include": "n1:0,2@n2", "hostfile": "hosts", "master_addr": "10.0.0.1"}),
    "openmpi": (CPU, POOL, {"deepspeed_mpi": True, "hostfile": "h", "launcher_args": "--mca btl_tcp_if_include ib0"}),
    "mpich": (GPU, POOL, {"launcher": "mpich", "hostfile": "h", "num_nodes": 1}),
    "slurm": (GPU, None, {"deepspeed_slurm": True, "num_nodes": 2, "account": "me", "comment": "big run"}),
    "torchrun": (GPU, None, {"launcher": "torchrun"}),
    "torchrun-hosts": (GPU, POOL, {"launcher": "torchrun", "hostfile": "h"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_print_launch(name: str) -> None:
    machine, pool, options = CASES[name]
    planned = job(machine, pool, **options)
    text = describe(planned)
    assert "do-not-show" not in text
    check_golden(f"{name}.txt", text)


def test_dry_run_is_one_process_whatever_the_mesh() -> None:
    planned = plan_job(LaunchOptions(pipe_parallel_size=4, hostfile="h"), GPU, "train.py", ["--dry-run"], port=1, alone=True)
    assert (planned.route, planned.processes) == ("python", 1)


@pytest.mark.parametrize(
    ("machine", "pool", "options", "words"),
    [
        (GPU, None, {"num_gpus": 8}, "more than the 4 accelerators"),
        (CPU, None, {"num_gpus": 3, "model_parallel_size": 2}, "cannot hold"),
        (CPU, POOL, {"model_parallel_size": 3}, "8 processes cannot hold"),
        (CPU, POOL, {"include": "n1", "exclude": "n2"}, "contradict"),
        (CPU, None, {"launcher": "magic"}, "unknown launcher"),
        (CPU, None, {"num_nodes": 2}, "needs to know the hosts"),
        (CPU, POOL, {"launcher": "openmpi", "include": "n1:1"}, "single slots"),
        (CPU, {"a": 1, "b": 2}, {"launcher": "slurm"}, "uneven"),
        (CPU, None, {"launcher": "none", "model_parallel_size": 2}, "cannot hold"),
    ],
)
def test_contradictions_are_refused(machine: Machine, pool: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job(machine, pool, **options)


def test_a_secret_asked_for_by_name_is_refused() -> None:
    with pytest.raises(LaunchError, match="WANDB_API_KEY looks like a secret"):
        job(GPU, POOL, hostfile="h", export_env=("WANDB_API_KEY",))


def test_a_remote_host_alone_is_reached_through_the_runner() -> None:
    assert job(CPU, {"far": 2}, hostfile="h").route == "hosts"
    assert job(CPU, {"localhost": 2}, hostfile="h").route == "local"


def test_options_come_from_config_sections() -> None:
    launch = SimpleNamespace(num_gpus=4, hostfile=None, master_port=1234)
    parallel = SimpleNamespace(pipe_parallel_size=0, model_parallel_size=2)
    options = LaunchOptions.from_sections(launch, parallel)
    assert (options.num_gpus, options.master_port, options.model_processes) == (4, 1234, 2)


def test_without_a_port_in_the_configuration_two_jobs_get_two() -> None:
    """Both free ports are bound at once, so that they cannot be one."""
    plain = LaunchOptions()
    with socket.socket() as first, socket.socket() as second:
        first.bind(("", rendezvous_port(plain, given=False, hosts=0)))
        second.bind(("", rendezvous_port(plain, given=False, hosts=0)))
    many = {rendezvous_port(LaunchOptions(hostfile="h"), given=False, hosts=2) for _ in range(5)}
    assert len(many) > 1 and 29500 not in many, "one command tells all hosts, so that the port may be any"


@pytest.mark.parametrize(
    ("options", "given", "hosts", "port"),
    [
        ({"master_port": 1234}, True, 0, 1234),
        ({"master_port": 29500}, True, 0, 29500),
        ({"master_port": 1234, "hostfile": "h"}, True, 2, 1234),
        ({"launcher": "torchrun", "num_nodes": 2}, False, 0, 29500),
        ({"launcher": "torchrun", "hostfile": "h"}, False, 2, 29500),
    ],
)
def test_a_port_that_is_given_is_taken_and_torchrun_on_several_hosts_agrees(
    options: dict[str, Any], given: bool, hosts: int, port: int
) -> None:
    assert rendezvous_port(LaunchOptions(**options), given, hosts) == port
    if options.get("launcher") == "torchrun":
        alone = LaunchOptions(launcher="torchrun", num_nodes=1, hostfile=options.get("hostfile"))
        assert rendezvous_port(alone, given, hosts) != 29500


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ("0", "1", "2", "3")),
        ("", ()),
        ("-1", ()),
        ("2,3", ("2", "3")),
        ("1,9,0", ("1",)),
        ("GPU-ab,GPU-cd", ("GPU-ab", "GPU-cd")),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, ids: tuple[str, ...]) -> None:
    assert chosen_devices(4, visible) == ids
    assert chosen_devices(0, visible) == ()


def test_the_devices_that_the_user_made_visible_are_the_ones_used() -> None:
    planned = job(Machine(devices=("2", "3"), cores=4, python="/py"))
    info = next(word for word in planned.command if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(info.removeprefix("--world_info="))) == {"localhost": [2, 3]}
