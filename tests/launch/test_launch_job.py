"""Options and a machine give exactly one command."""

from __future__ import annotations

import base64
import json
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.launch.job import Job, LaunchOptions, Machine, plan_job
from megatron.launch.runners import chosen_devices, usable_port

CPU = Machine(devices=(), cores=8, python="/py")
GPU = Machine(devices=("0", "1", "2", "3"), cores=64, python="/py")
ARGS = ["-d", "configs", "a.yml", "--set", "train_iters=5"]


def job(machine: Machine = CPU, **options: Any) -> Job:
    return plan_job(LaunchOptions(**options), machine, "train.py", ARGS, port=29500)


LOCAL = (
    "/py -u -m deepspeed.launcher.launch --world_info={world} --master_addr=127.0.0.1 --master_port=29500 "
    "--no_local_rank --log_level=critical train.py -d configs a.yml --set train_iters=5"
)
HOSTS = "/py -m deepspeed.launcher.runner {options} --no_local_rank train.py -d configs a.yml --set train_iters=5"
TWO, FOUR = "eyJsb2NhbGhvc3QiOiBbMCwgMV19", "eyJsb2NhbGhvc3QiOiBbMCwgMSwgMiwgM119"
GOLDEN = [
    (CPU, {}, "DS_ACCELERATOR=cpu GOMP_SPINCOUNT=1000 /py -u train.py -d configs a.yml --set train_iters=5"),
    (CPU, {"num_gpus": 2}, "DS_ACCELERATOR=cpu GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=4 " + LOCAL.format(world=TWO)),
    (
        CPU,
        {"pipe_parallel_size": 2, "model_parallel_size": 2},
        "DS_ACCELERATOR=cpu GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=2 " + LOCAL.format(world=FOUR),
    ),
    (GPU, {}, "OMP_NUM_THREADS=16 " + LOCAL.format(world=FOUR)),
    (GPU, {"num_gpus": 1}, "/py -u train.py -d configs a.yml --set train_iters=5"),
    (GPU, {"hostfile": "hosts"}, HOSTS.format(options="--hostfile=hosts --master_port=29500")),
    (
        GPU,
        {"include": "n1:0,1@n2", "hostfile": "hosts", "num_gpus": 2, "master_addr": "n1"},
        HOSTS.format(options="--hostfile=hosts --include=n1:0,1@n2 --master_addr=n1 --master_port=29500"),
    ),
    (
        GPU,
        {"deepspeed_slurm": True, "num_nodes": 2, "account": "me", "comment": "big run"},
        HOSTS.format(
            options="--num_nodes=2 --master_port=29500 --launcher=slurm "
            "'--launcher_args='\"'\"'--comment=big run'\"'\"' --account=me' --force_multi"
        ),
    ),
    (
        CPU,
        {"launcher": "openmpi", "deepspeed_mpi": True, "hostfile": "h", "no_ssh_check": True},
        "DS_ACCELERATOR=cpu GOMP_SPINCOUNT=1000 "
        + HOSTS.format(options="--hostfile=h --master_port=29500 --launcher=openmpi --force_multi --no_ssh_check"),
    ),
]


@pytest.mark.parametrize(("machine", "options", "command"), GOLDEN)
def test_command(machine: Machine, options: dict[str, Any], command: str) -> None:
    assert job(machine, **options).describe() == command


def test_dry_run_is_one_process_whatever_the_mesh() -> None:
    planned = plan_job(LaunchOptions(pipe_parallel_size=4, hostfile="h"), GPU, "train.py", ["--dry-run"], port=1, alone=True)
    assert (planned.route, planned.processes) == ("python", 1)


@pytest.mark.parametrize(
    ("machine", "options", "words"),
    [
        (GPU, {"num_gpus": 8}, "more than the 4 accelerators"),
        (CPU, {"num_gpus": 3, "model_parallel_size": 2}, "cannot hold"),
        (CPU, {"include": "a", "exclude": "b"}, "contradict"),
        (CPU, {"launcher": "magic", "force_multi": True}, "unknown launcher"),
    ],
)
def test_contradictions_are_refused(machine: Machine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job(machine, **options)


def test_options_come_from_config_sections() -> None:
    launch = SimpleNamespace(num_gpus=4, hostfile=None, master_port=1234)
    parallel = SimpleNamespace(pipe_parallel_size=0, model_parallel_size=2)
    options = LaunchOptions.from_sections(launch, parallel)
    assert (options.num_gpus, options.master_port, options.model_processes) == (4, 1234, 2)


def test_a_taken_default_port_is_replaced_and_a_wanted_one_kept() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert usable_port(port) == port
    assert usable_port(29500) > 0


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
