"""The job as a file for a cluster: `sbatch` of Slurm, a JobSet of Kubernetes, a task of SkyPilot.

The same processes, mesh and arguments as `deepy.py` would start by itself. Ranks find each other through the variables that the
cluster sets; secrets are named, never written. Exit codes 21, 22 and 75 (docs/reliability.md) mean "start me again".
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.launch.options import LaunchOptions

KINDS = ("slurm", "kubernetes", "skypilot")
_AGAIN = (21, 22, 75)
_SECRETS = ("WANDB_API_KEY", "HF_TOKEN")


@dataclass(frozen=True)
class Shape:
    """name: of the run. nodes x slots processes; gpus: whether a slot is a GPU. command: script and arguments."""

    name: str
    nodes: int
    slots: int
    gpus: bool
    run_dir: str
    command: tuple[str, ...]
    port: int


def shape_of(options: LaunchOptions, name: str, run_dir: str, command: tuple[str, ...], gpus: bool) -> Shape:
    """Nodes and slots of a job: `num_nodes` x `num_gpus`, else as many slots as one copy of the model needs.

    Raises:
        ConfigError: they do not hold the mesh.
    """
    nodes = max(1, options.num_nodes)
    slots = options.num_gpus or -(-options.model_processes // nodes)
    if nodes * slots % options.model_processes:
        raise ConfigError(
            f"{nodes} nodes x {slots} slots cannot hold pipe_parallel_size {options.pipe_parallel_size} x "
            f"model_parallel_size {options.model_parallel_size}",
            hint="set num_nodes and num_gpus",
        )
    return Shape(
        re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "run", nodes, slots, gpus, run_dir, command, options.master_port
    )


def job_file(kind: str, options: LaunchOptions, shape: Shape, image: str | None = None, accelerator: str = "H100") -> str:
    """Text of the file. image: container image; accelerator: SkyPilot's name of the device."""
    image = image or ("linear-neox:cuda" if shape.gpus else "linear-neox:cpu")
    if kind == "slurm":
        return _slurm(options, shape)
    return _kubernetes(shape, image) if kind == "kubernetes" else _skypilot(shape, image, accelerator)


def _slurm(options: LaunchOptions, shape: Shape) -> str:
    lines = [f"--job-name={shape.name}", f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.slots}"]
    lines += [f"--gpus-per-node={shape.slots}"] if shape.gpus else []
    lines += [f"--{key}={json.dumps(v)}" for key in ("account", "comment") if (v := getattr(options, key))]
    # USR1 five minutes before the time limit: all ranks save and leave with 75, and the job puts itself back into the queue.
    lines += ["--signal=USR1@300", "--requeue", "--open-mode=append", f"--output={shape.run_dir}/logs/slurm-%j.txt"]
    head = "".join(f"#SBATCH {line}\n" for line in lines)
    again = "|".join(map(str, _AGAIN))
    extra = f" {options.launcher_args}" if options.launcher_args else ""
    return f"""#!/bin/bash
# Written by deepy.py --print-job slurm. Submit: mkdir -p {shape.run_dir}/logs && sbatch THIS_FILE
{head}
set -uo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
srun --kill-on-bad-exit=1{extra} python -u {shlex.join(shape.command)}
code=$?
case $code in {again}) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
"""


def _yaml(value: object, indent: int = 0) -> str:
    """Block YAML of dictionaries, lists and scalars; strings are written as JSON, which is YAML."""
    pad = "  " * indent
    if isinstance(value, dict):
        rows = []
        for key, item in value.items():
            deeper = isinstance(item, dict | list) and item
            if isinstance(item, str) and "\n" in item:
                body = "\n".join("  " * (indent + 1) + line for line in item.rstrip("\n").split("\n"))
                rows.append(f"{pad}{key}: |\n{body}")
            else:
                rows.append(f"{pad}{key}:" + ("\n" + _yaml(item, indent + 1) if deeper else f" {json.dumps(item)}"))
        return "\n".join(rows)
    if isinstance(value, list):
        return "\n".join(f"{pad}- " + (_yaml(v, indent + 1).lstrip() if isinstance(v, dict) else json.dumps(v)) for v in value)
    return pad + json.dumps(value)


def _kubernetes(shape: Shape, image: str) -> str:
    resources = {"nvidia.com/gpu": shape.slots} if shape.gpus else {"cpu": shape.slots}
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "linear-neox", "key": name, "optional": True}}}
        for name in _SECRETS
    ]
    torchrun = ["torchrun", f"--nnodes={shape.nodes}", f"--nproc_per_node={shape.slots}", "--node_rank=$(JOB_COMPLETION_INDEX)"]
    torchrun += [f"--master_addr={shape.name}-ranks-0-0.{shape.name}", f"--master_port={shape.port}", *shape.command]
    container = {
        "name": "trainer",
        "image": image,
        "command": torchrun,
        "ports": [{"containerPort": shape.port}],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}, *secrets],
        "resources": {"limits": resources},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "runs", "mountPath": "/workspace/runs"}],
    }
    volumes = [
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": "linear-neox-runs"}},
    ]
    job = {
        "parallelism": shape.nodes,
        "completions": shape.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": {"restartPolicy": "Never", "containers": [container], "volumes": volumes}},
    }
    body = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": shape.name},
        "spec": {
            # All pods start anew when one fails; the run goes on from its last checkpoint.
            "failurePolicy": {"maxRestarts": 10},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return f"# Written by deepy.py --print-job kubernetes. Submit: kubectl apply -f THIS_FILE\n{_yaml(body)}\n"


def _skypilot(shape: Shape, image: str, accelerator: str) -> str:
    resources: dict[str, object] = (
        {"accelerators": f"{accelerator}:{shape.slots}"} if shape.gpus else {"cpus": f"{shape.slots}+"}
    )
    run = (
        'first="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"\n'
        f'torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc_per_node={shape.slots} --node_rank="$SKYPILOT_NODE_RANK" \\\n'
        f'  --master_addr="$first" --master_port={shape.port} {shlex.join(shape.command)}\n'
    )
    body = {
        "name": shape.name,
        "num_nodes": shape.nodes,
        "resources": {**resources, "image_id": f"docker:{image}", "job_recovery": {"recover_on_exit_codes": list(_AGAIN)}},
        "workdir": ".",
        "secrets": dict.fromkeys(_SECRETS),
        "run": run,
    }
    return (
        f"# Written by deepy.py --print-job skypilot. Submit: sky jobs launch THIS_FILE --secret WANDB_API_KEY\n{_yaml(body)}\n"
    )
