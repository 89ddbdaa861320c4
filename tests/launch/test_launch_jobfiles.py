"""Job files: kept in golden files (REGEN=1 rewrites them), read by the schemas of their clusters, and closed to any value.

`kubeflow-trainer-api` has the types of JobSet and of all that Kubernetes puts into one. Slurm's own parser is asked in
`test_launch_hosts.py`, SkyPilot's fields are in `test_launch_skypilot.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.load import load_config
from megatron.errors import ConfigError
from megatron.launch.containers import to_yaml
from megatron.launch.job_shape import AGAIN, Shape, Site, shape_of
from megatron.launch.jobfiles import KINDS, job_file
from megatron.launch.mounts import Folder, Places, places_of, slug
from megatron.launch.options import LaunchOptions
from tests.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
COMMAND = ("train.py", "-d", "configs", "a.yml", "--set", "train_iters=5", "--set", "a=b c")
PLACES = Places(
    (Folder("/workspace/runs", "runs", True), Folder("/workspace/data", "data", True), Folder("/mnt/tok", "mnt-tok", False)),
    ("merges.txt",),
    (("/workspace/configs/a.yml", "# a run\n{ num_layers: 2 }\n"),),
)
OPTIONS = LaunchOptions(num_nodes=2, num_gpus=8, model_parallel_size=4, account="me", comment='a "big" run', master_port=29501)
SITE = Site(time="1-00:00:00", partition="gpu,long", cpus=6, python="/home/me/.venv/bin/python")
# What must stay a word wherever it stands.
EVIL = """a b'c"d$(touch pwned)`touch pwned`;touch pwned #\\ %x & é"""


def shape(gpus: bool = True, **more: Any) -> Shape:
    known = {"places": PLACES, "save_s": 900, "variables": {"NCCL_DEBUG": "WARN $(x)"}}
    return shape_of(OPTIONS, "MetaLA 1b", "runs/a", COMMAND, gpus, **known | more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [True, False])
def test_golden_files(kind: str, gpus: bool) -> None:
    text, path = job_file(kind, OPTIONS, shape(gpus), SITE), GOLDEN / f"{kind}-{'gpu' if gpus else 'cpu'}.txt"
    if os.environ.get("REGEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def jobset(given: Shape, site: Site = SITE) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ConfigMap, JobSet) of the written file."""
    config, body = yaml.safe_load_all(job_file("kubernetes", OPTIONS, given, site))
    return config, body


def pod_of(body: dict[str, Any]) -> dict[str, Any]:
    return body["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("gpus", [True, False])
def test_kubernetes_takes_the_jobset(gpus: bool) -> None:
    """Each field by its type and name: one that the schema does not know would not come back."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    config, body = jobset(shape(gpus))
    read = models.JobsetV1alpha2JobSet.from_dict(body)
    assert read is not None and read.to_dict() == body
    broken = yaml.safe_load(yaml.safe_dump(body))
    pod_of(broken)["graceSeconds"] = 5
    assert models.JobsetV1alpha2JobSet.from_dict(broken).to_dict() != broken, "a field of no schema must show"
    assert config["data"] == {"0-a-yml": PLACES.configs[0][1]}


def test_kubernetes_mounts_waits_for_a_save_and_gives_up_on_mistakes() -> None:
    config, body = jobset(shape())
    job = body["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = pod_of(body)
    container = pod["containers"][0]
    assert container["command"][-8:] == list(COMMAND) and job["parallelism"] == 2
    assert container["resources"] == {"requests": {"cpu": "48"}, "limits": {"nvidia.com/gpu": 8}}
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert set(mounts) == {"/dev/shm", "/workspace/runs", "/workspace/data", "/mnt/tok", "/workspace/configs/a.yml"}
    assert mounts["/mnt/tok"]["readOnly"] and "readOnly" not in mounts["/workspace/runs"]
    assert mounts["/workspace/configs/a.yml"]["subPath"] in config["data"]
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
    assert claims[mounts["/workspace/runs"]["name"]] == "linear-neox-runs"
    assert {m["name"] for m in container["volumeMounts"]} == set(claims)
    assert pod["terminationGracePeriodSeconds"] == 900
    (rule,) = job["podFailurePolicy"]["rules"]
    final = rule["onExitCodes"]["values"]
    assert final == sorted(set(final)) and not {0, *AGAIN} & set(final) and {2, 3, 4, 7} <= set(final)
    (policy,) = body["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert {"name": "NCCL_DEBUG", "value": "WARN $$(x)"} in container["env"], "Kubernetes fills $(x) in"


def directives(text: str) -> dict[str, str]:
    """Options of sbatch as its manual has them: double quotes, backslashes inside, to the end of the line."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            key, _, value = word.removeprefix("--").partition("=")
            found[key] = value
    return found


def test_slurm_header_and_environment() -> None:
    text = job_file("slurm", OPTIONS, shape(), SITE)
    found = directives(text)
    assert found["time"] == "1-00:00:00" and found["partition"] == "gpu,long" and found["cpus-per-task"] == "6"
    assert found["comment"] == 'a "big" run' and found["gpus-per-node"] == "8" and found["output"] == "runs/a/logs/slurm-%j.txt"
    assert "export PATH=/home/me/.venv/bin:" in text and "export NCCL_DEBUG='WARN $(x)'\n" in text
    assert '--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"' in text and "DS_ACCELERATOR" not in text
    plain = directives(job_file("slurm", LaunchOptions(), shape_of(LaunchOptions(), "a", "r", ("t.py",), False)))
    assert plain["cpus-per-task"] == "1" and not {"time", "partition", "gpus-per-node", "account"} & set(plain)


@pytest.mark.parametrize(
    ("limit", "asked", "slurm"),
    [
        ("3:50:00", None, "04:00:00"),
        ("45:00", None, "00:55:00"),
        (90, None, "00:12:00"),
        ("1-06:00:00", None, "1-06:10:00"),
        ("3:50:00", "120", "120"),
        (None, "2-00", "2-00"),
    ],
)
def test_slurm_time(limit: str | int | None, asked: str | None, slurm: str) -> None:
    """The cluster's limit leaves room for the run's own; the flag beats it."""
    assert directives(job_file("slurm", OPTIONS, shape(time_limit=limit), Site(time=asked)))["time"] == slurm


def test_what_cannot_stand_in_a_job_file_is_refused() -> None:
    for options in (dataclasses.replace(OPTIONS, comment="a\n#SBATCH --uid=0"), dataclasses.replace(OPTIONS, account="a\x00")):
        with pytest.raises(ConfigError, match="cannot stand in a job file"):
            job_file("slurm", options, shape(), SITE)
    with pytest.raises(ConfigError, match="cannot stand in a job file"):
        job_file("slurm", OPTIONS, dataclasses.replace(shape(), run_dir="a\nb"), SITE)
    for bad in ("soon", "1:2:3:4", "1;x"):
        with pytest.raises(ConfigError, match="is not a time of Slurm"):
            job_file("slurm", OPTIONS, shape(), Site(time=bad))
    with pytest.raises(ConfigError, match="cannot hold"):
        shape_of(LaunchOptions(num_nodes=1, num_gpus=3, model_parallel_size=2), "a", "r", (), True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_reaches_a_shell(kind: str, tmp_path: Path) -> None:
    """Every text a configuration can say, at once; the written script is run with stand-ins for the programs it calls."""
    options = dataclasses.replace(OPTIONS, account=EVIL, comment=EVIL, launcher_args=f"--x={shlex.quote(EVIL)}")
    command = ("train.py", "--set", f"name={EVIL}")
    places = Places((Folder(f"/workspace/{EVIL}", "x", True),), (EVIL,), ((f"/workspace/{EVIL}", f"{EVIL}\n"),))
    known = {"variables": {"X": EVIL}, "places": places}
    given = shape_of(options, EVIL, f"runs/{EVIL}", command, True, **known)
    site = Site(image=EVIL, accelerator="H100", partition=EVIL, storage=EVIL, python=f"/{EVIL}/bin/python")
    text = job_file(kind, options, given, site)
    for name in ("srun", "scontrol", "python"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$HERE/$(basename "$0").words"\nexit 75\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path), "SKYPILOT_NODE_IPS": "a", "SLURM_JOB_ID": "1"}
    work = tmp_path / "work"
    work.mkdir()
    if kind == "kubernetes":
        config, body = yaml.safe_load_all(text)
        container = pod_of(body)["containers"][0]
        assert container["command"][-1] == f"name={EVIL}".replace("$(", "$$(") and container["image"] == EVIL
        assert container["env"][1] == {"name": "X", "value": EVIL.replace("$(", "$$(")}
        assert list(config["data"].values()) == [f"{EVIL}\n"]
        return
    if kind == "slurm":
        assert directives(text)["comment"] == EVIL and directives(text)["output"] == f"runs/{EVIL}/logs/slurm-%j.txt".replace(
            "%x", "%%x"
        )
        (submit,) = re.findall(r"Submit: (.*) && sbatch", text)
        assert shlex.split(submit) == ["mkdir", "-p", f"runs/{EVIL}/logs"]
    else:
        assert yaml.safe_load(text)["envs"]["X"] == EVIL
        text = yaml.safe_load(text)["run"].replace("/mnt/linear-neox", str(tmp_path))
    done = subprocess.run(["bash", "-c", text], cwd=work, env=env, capture_output=True, text=True, check=False)
    words = (tmp_path / ("srun.words" if kind == "slurm" else "python.words")).read_text().splitlines()
    assert done.returncode == 75 and words[-1] == f"name={EVIL}", done.stderr
    assert not list(tmp_path.rglob("*pwned")), "something was carried out"


def test_yaml_comes_back_as_it_was() -> None:
    value = {
        "a": EVIL,
        "b": ["x\ty", "\u2028", "\U0001f600", "\x07"],
        "c": "l1\n  l2\n\nl4\n",
        "d": "no end\nhere",
        "e": " x\ny",
    }
    value |= {
        "f": "x\n\n",
        "g": {},
        "h": [],
        "i": None,
        "j": True,
        "k": 5,
        "9 k:": {"z": [{"a": 1, "b": [2]}]},
        "l": "\n",
        "m": "",
    }
    assert yaml.safe_load(to_yaml(value)) == value


def test_names_that_every_cluster_takes() -> None:
    names = [slug(text) for text in ("125M", "MetaLA 1b", "x" * 90, "--", "é", "a_b.c", "A" * 39 + "-b")]
    assert names[0] == "run-125m" and names[5] == "a-b-c"
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name) for name in names), names


def test_places_of_a_run(tmp_path: Path) -> None:
    """Everything that a configuration names and a run opens; what the image holds and datasets of a hub are left out."""
    values = {"run_dir": "runs/a", "save": "/mnt/runs/a/checkpoints", "load": "/mnt/runs/b", "log_dir": "logs/x"}
    values |= {
        "tensorboard_dir": "/mnt/runs/tb",
        "data_path": "data/pile/text",
        "vocab_file": "tok.json",
        "merge_file": "../m/merges",
    }
    config = write_run(tmp_path, **values)
    found = places_of(load_config([str(config)], check=False), [("configs/a.yml", "x")])
    assert {(f.path, f.written) for f in found.folders} == {
        ("/workspace/runs", True),
        ("/mnt/runs", True),
        ("/workspace/logs", True),
        ("/workspace/data", True),
        ("/m", False),
    }
    assert found.files == ("tok.json",) and found.configs == (("/workspace/configs/a.yml", "x"),)
    changes = {"data_path": None, "train_stream": ["hf:wikitext?split=train", "text/a.jsonl"], "vocab_file": "configs/tok.json"}
    streamed = load_config([str(write_run(tmp_path, **{k: v for k, v in changes.items() if v is not None}))], check=False)
    paths = {f.path for f in places_of(streamed).folders}
    assert "/workspace/text" in paths and not any("hf:" in path or path.endswith("configs") for path in paths)


def test_the_command_writes_them(tmp_path: Path) -> None:
    config = write_run(tmp_path, run_dir="runs/a b", export_env=["SOME_FLAG", "MY_TOKEN"], time_limit="1:00:00", train_iters=2)
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), "-d", str(tmp_path), "tiny"]
    env = {**os.environ, "SOME_FLAG": "1", "MY_TOKEN": "do-not-show"}
    more = ["--partition", "p", "--cpus-per-task", "3", "--storage", "mine", "--cpu", "--num_gpus", "2"]
    for kind in KINDS:
        words = [*command, "--print-job", kind, *more]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "SOME_FLAG" in done.stdout and "do-not-show" not in done.stdout
        if kind == "slurm":
            found = directives(done.stdout)
            assert (found["time"], found["partition"], found["cpus-per-task"]) == ("01:10:00", "p", "3")
            assert f"export PATH={Path(sys.executable).parent}" in done.stdout
            assert "--partition" not in done.stdout.split("srun")[-1]
        if kind == "kubernetes":
            config_map, body = yaml.safe_load_all(done.stdout)
            assert list(config_map["data"].values()) == [config.read_text()]
            assert "mine-runs" in str(pod_of(body)["volumes"])
