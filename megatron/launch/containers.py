"""Job files for container clusters: a Kubernetes JobSet, a SkyPilot task.

On each node `megatron/launch/node.py` starts the ranks. So the container ends with an exit code of docs/reliability.md, and a
signal reaches every rank.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from typing import Any

import yaml

from megatron.launch.job_shape import AGAIN, SECRETS, Shape, Site
from megatron.launch.mounts import HOME, Folder, slug

# Exit codes that a restart would meet again: a defect, configuration, data, checkpoint, export, training, does not fit, no
# save folder. Not 5: ranks that did not find each other may do so at the next start.
_FINAL = (1, 2, 3, 4, 6, 7, 8, 76)
_PLAIN_KEY = re.compile(r"[A-Za-z][\w./-]*")
_SHARED = "/mnt/linear-neox"  # where SkyPilot mounts what the work folder links to


class _Text(str):
    """A string that is quoted or in block style, so that no reader takes it for another type; all but plain keys."""


class _Dumper(yaml.SafeDumper):
    """Block style, with indented lists and without aliases."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists below their key too."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        """Write a repeated value again."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: _Text) -> yaml.ScalarNode:
    lines = text.split("\n")
    # Block style only where it gives exactly this text back: printable lines, no indentation, at most one final line end.
    readable = len(lines) > 1 and all(map(str.isprintable, lines)) and text[:1] not in (" ", "\n") and text[-2:] != "\n\n"
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|" if readable else '"')


_Dumper.add_representer(_Text, _represent_text)


def _mark_texts(value: object) -> object:
    if isinstance(value, dict):
        return {key if _PLAIN_KEY.fullmatch(key) else _Text(key): _mark_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_texts(item) for item in value]
    return _Text(value) if isinstance(value, str) else value


def to_yaml(value: object) -> str:
    """Block YAML of dictionaries, lists and scalars; printable strings of several lines are in block style."""
    text = yaml.dump(
        _mark_texts(value), Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1 << 30
    )
    return text.removesuffix("\n")


def _image(shape: Shape, site: Site) -> str:
    return site.image or ("linear-neox:cuda" if shape.gpus else "linear-neox:cpu")


def _variables(shape: Shape, site: Site) -> dict[str, str]:
    device = {} if shape.gpus else {"DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": str(site.cores(shape.gpus)), **device, **shape.variables}


def _unmounted(shape: Shape) -> str:
    """A comment for each file that cannot be mounted."""
    return "".join(f"# The image must hold {path!a}: no folder that holds it can be mounted.\n" for path in shape.places.files)


def kubernetes(shape: Shape, site: Site) -> str:
    """A ConfigMap with the configuration files and a JobSet of one pod per node."""
    start = ["python", "-u", "-m", "megatron.launch.node", f"--nodes={shape.nodes}", f"--slots={shape.slots}"]
    start += ["--node=$(JOB_COMPLETION_INDEX)", f"--address={shape.name}-ranks-0-0.{shape.name}", f"--port={shape.port}"]
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "linear-neox", "key": name, "optional": True}}}
        for name in SECRETS
    ]
    cores = {"cpu": str(shape.slots * site.cores(shape.gpus))}
    configs = [(f"{i}-{slug(posixpath.basename(path))}", path, text) for i, (path, text) in enumerate(shape.places.configs)]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    for folder in shape.places.folders:
        mounts.append({"name": f"at-{folder.name}", "mountPath": folder.path} | ({} if folder.written else {"readOnly": True}))
        claim = {"claimName": f"{site.storage}-{folder.name}"}
        volumes.append({"name": f"at-{folder.name}", "persistentVolumeClaim": claim})
    for key, path, _ in configs:
        mounts.append({"name": "configs", "mountPath": path, "subPath": key, "readOnly": True})
    if configs:
        volumes.append({"name": "configs", "configMap": {"name": f"{shape.name}-configs"}})
    container = {
        "name": "trainer",
        "image": _image(shape, site),
        "workingDir": HOME,
        # Kubernetes substitutes $(NAME); $$( is a literal $(
        "command": [*start, *(word.replace("$(", "$$(") for word in shape.command)],
        "ports": [{"containerPort": shape.port, "protocol": "TCP"}],
        "env": [*({"name": n, "value": v.replace("$(", "$$(")} for n, v in _variables(shape, site).items()), *secrets],
        "resources": {"requests": cores, "limits": {"nvidia.com/gpu": shape.slots}} if shape.gpus else {"limits": cores},
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": shape.save_s,  # the longest save; pods that end earlier are not waited for
        "containers": [container],
        "volumes": volumes,
    }
    job = {
        "parallelism": shape.nodes,
        "completions": shape.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": list(_FINAL)}}
            ]
        },
        "template": {"spec": pod},
    }
    final = {"name": "mistakes", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    body = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": shape.name},
        "spec": {
            # All pods restart when one is lost, and the run resumes from its last checkpoint. A user's mistake ends it.
            "failurePolicy": {"maxRestarts": 10, "rules": [final]},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": job}}],
        },
    }
    head = f"# Written by deepy.py --print-job kubernetes. Submit: kubectl apply -f THIS_FILE\n{_unmounted(shape)}"
    names = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{shape.name}-configs"}}
    texts = to_yaml({**names, "data": {key: text for key, _, text in configs}}) + "\n---\n" if configs else ""
    return f"{head}{texts}{to_yaml(body)}\n"


def _sky_folders(shape: Shape, site: Site) -> tuple[dict[str, Any], str]:
    """(mounts, shell lines that link them to the paths in the configuration).

    One node writes through a cached bucket; several need a shared file system, a network volume.
    """
    mounts: dict[str, Any] = {}
    lines = ""
    for folder in shape.places.folders:
        inside = folder.relative
        path = folder.path if inside is None else f"{_SHARED}/{inside}"
        mounts[path] = _sky_mount(folder, f"{site.storage}-{folder.name}", shape.nodes)
        if inside is not None:
            name = shlex.quote(inside)
            lines += f"[ -e {name} ] || ln -s {shlex.quote(path)} {name}\n"
    return ({"volumes" if shape.nodes > 1 else "file_mounts": mounts} if mounts else {}), lines


def _sky_mount(folder: Folder, name: str, nodes: int) -> object:
    return name if nodes > 1 else {"name": name, "mode": "MOUNT_CACHED" if folder.written else "MOUNT"}


def skypilot(shape: Shape, site: Site) -> str:
    """A task for `sky jobs launch`; the work folder is uploaded, data and results are in buckets or volumes."""
    cores = shape.slots * site.cores(shape.gpus)
    resources: dict[str, object] = (
        {"accelerators": f"{site.accelerator}:{shape.slots}"} if shape.gpus else {"cpus": f"{cores}+"}
    )
    resources |= {"image_id": f"docker:{_image(shape, site)}", "job_recovery": {"recover_on_exit_codes": list(AGAIN)}}
    mounts, links = _sky_folders(shape, site)
    unset = "".join(f'[ -n "${{{name}:-}}" ] || unset {name}\n' for name in SECRETS)
    run = (
        f'{links}{unset}first="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"\n'
        f'python -u -m megatron.launch.node --nodes="$SKYPILOT_NUM_NODES" --slots={shape.slots} \\\n'
        f'  --node="$SKYPILOT_NODE_RANK" --address="$first" --port={shape.port} \\\n  {shlex.join(shape.command)}\n'
    )
    body = {
        "name": shape.name,
        "num_nodes": shape.nodes,
        "resources": resources,
        "workdir": ".",
        **mounts,
        "envs": _variables(shape, site),
        # empty is optional; `--secret NAME` fills one from the environment
        "secrets": dict.fromkeys(SECRETS, ""),
        "run": run,
    }
    submit = "# Written by deepy.py --print-job skypilot. Submit: sky jobs launch THIS_FILE [--secret WANDB_API_KEY]\n"
    return f"{submit}{_unmounted(shape)}{to_yaml(body)}\n"
