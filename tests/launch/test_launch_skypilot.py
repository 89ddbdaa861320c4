"""The SkyPilot job file: fields that SkyPilot takes, codes that are recovered from, folders and secrets on the machine.

SkyPilot itself brings a hundred packages, which do not install beside ours. `TASK` is what its release 0.14.1 takes in the
fields that a file of ours may have.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.launch.job_shape import AGAIN
from megatron.launch.jobfiles import job_file
from tests.launch.test_launch_jobfiles import COMMAND, OPTIONS, SITE, shape

# Field -> what it may hold: a type, the choices, or fields in it, whose names may be a pattern. `[x]`: a list of x.
TASK: dict[str, Any] = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "run": str,
    "envs": {re.compile(r"[A-Za-z_][A-Za-z0-9_]*"): str},
    "secrets": {re.compile(r".+"): str},
    "file_mounts": {re.compile(r"/.+"): {"name": str, "mode": ("MOUNT", "COPY", "MOUNT_CACHED")}},
    "volumes": {re.compile(r"/.+"): str},
    "resources": {
        "accelerators": str,
        "cpus": str,
        "image_id": str,
        "job_recovery": {"recover_on_exit_codes": [range(256)]},
    },
}


def mistakes(value: Any, rule: Any, place: str = "") -> Iterator[str]:
    """The places in `value` that are not as `rule` says."""
    if isinstance(rule, list):
        for index, item in enumerate(value):
            yield from mistakes(item, rule[0], f"{place}[{index}]")
    elif isinstance(rule, dict):
        for name, inner in value.items():
            known = next((r for k, r in rule.items() if k == name or (not isinstance(k, str) and k.fullmatch(name))), None)
            path = f"{place}.{name}".lstrip(".")
            yield from [path] if known is None else mistakes(inner, known, path)
    elif not (isinstance(value, rule) if isinstance(rule, type) else value in rule):
        yield place


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_reads_the_task(gpus: bool, nodes: int) -> None:
    text = job_file("skypilot", OPTIONS, dataclasses.replace(shape(gpus), nodes=nodes), SITE)
    body = yaml.safe_load(text)
    paths = {"/mnt/linear-neox/runs", "/mnt/linear-neox/data", "/mnt/tok"}
    assert set(body["volumes" if nodes > 1 else "file_mounts"]) == paths
    if nodes == 1:
        modes = {path: mount["mode"] for path, mount in body["file_mounts"].items()}
        assert modes == dict.fromkeys(paths, "MOUNT_CACHED") | {"/mnt/tok": "MOUNT"}
    assert body["resources"]["job_recovery"]["recover_on_exit_codes"] == list(AGAIN)
    assert set(body["secrets"].values()) == {""}, "null would ask for it"
    assert (body["num_nodes"], body["name"]) == (nodes, "metala-1b")
    assert list(mistakes(body, TASK)) == []


def test_a_task_that_skypilot_would_refuse_is_found() -> None:
    body = yaml.safe_load(job_file("skypilot", OPTIONS, dataclasses.replace(shape(), nodes=1), SITE))
    body["node_count"] = 1
    body["num_nodes"] = "1"
    body["resources"]["job_recovery"]["recover_on_exit_codes"][0] = 256
    body["file_mounts"]["/mnt/tok"]["mode"] = "MOUNTED"
    body["envs"]["A-B"] = "x"
    body["secrets"]["HF_TOKEN"] = 5
    assert sorted(mistakes(body, TASK)) == [
        "envs.A-B",
        "file_mounts./mnt/tok.mode",
        "node_count",
        "num_nodes",
        "resources.job_recovery.recover_on_exit_codes[0]",
        "secrets.HF_TOKEN",
    ]


def test_skypilot_folders_are_linked_and_empty_secrets_unset(tmp_path: Path) -> None:
    """The shell lines before the start, run; the start itself is stood in for."""
    run = yaml.safe_load(job_file("skypilot", OPTIONS, shape(), SITE))["run"]
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@" "W=${WANDB_API_KEY-unset} H=${HF_TOKEN-unset}"\nexit 75\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "work" / "data").mkdir(parents=True)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_API_KEY": "", "HF_TOKEN": "x", "SKYPILOT_NODE_RANK": "1"}
    env |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    for _ in range(2):  # a recovery on the same machine finds its links
        done = subprocess.run(["bash", "-c", run], cwd=tmp_path / "work", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 75, "the code of the ranks is the code of the job"
        words = done.stdout.splitlines()
        assert words[-1] == "W=unset H=x" and words[-9:-1] == list(COMMAND)
        assert words[3:8] == ["--nodes=2", "--slots=8", "--node=1", "--address=10.0.0.1", "--port=29501"]
    assert (tmp_path / "work" / "runs").readlink() == Path("/mnt/linear-neox/runs")
    assert not (tmp_path / "work" / "data").is_symlink(), "what was sent along is used"
