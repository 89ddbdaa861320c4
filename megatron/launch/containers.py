"""Job files of clusters that run containers: a JobSet of Kubernetes, a task of SkyPilot.

On each node `megatron/launch/node.py` starts the ranks, so that the container ends with a code of docs/reliability.md
and a signal reaches every rank.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from typing import Any

from megatron.launch.job_shape import AGAIN, SECRETS, Shape, Site
from megatron.launch.mounts import HOME, Folder, slug

# Ends that the same start meets again: a defect, configuration, data, checkpoint, export, training, no room, nowhere to save.
# Not 5: ranks that did not find each other may do so at the next start.
_FINAL = (1, 2, 3, 4, 6, 7, 8, 76)
_PLAIN_KEY = re.compile(r"[A-Za-z][\w./-]*")
_END = "\n"
_SHARED = "/mnt/linear-neox"  # where SkyPilot mounts what the work folder links to


def _quoted(text: str) -> str:
    """A double-quoted scalar of YAML; what a reader might take for a line end or refuse is written as its number."""
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}

    def sign(letter: str) -> str:
        if letter in named:
            return named[letter]
        code = ord(letter)
        return letter if letter.isprintable() and code < 0x10000 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + "".join(map(sign, text)) + '"'


def _scalar(value: object) -> str:
    if isinstance(value, str):
        return _quoted(value)
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def to_yaml(value: object, indent: int = 0) -> str:
    """Block YAML of dictionaries, lists and scalars; strings of several printable lines stand as they are."""
    pad = "  " * indent
    if isinstance(value, dict):
        rows = []
        for key, item in value.items():
            head = pad + (key if _PLAIN_KEY.fullmatch(key) else _quoted(key)) + ":"
            if isinstance(item, dict | list) and item:
                rows.append(f"{head}\n{to_yaml(item, indent + 1)}")
            elif isinstance(item, str) and "\n" in item and _readable(item):
                body = "\n".join("  " * (indent + 1) + line if line else "" for line in item.rstrip("\n").split("\n"))
                rows.append(f"{head} {'|' if item[-1] == _END else '|-'}{_END}{body}")
            else:
                rows.append(f"{head} {'{}' if item == {} else '[]' if item == [] else _scalar(item)}")
        return "\n".join(rows)
    if isinstance(value, list):
        return "\n".join(f"{pad}- " + (to_yaml(v, indent + 1).lstrip() if isinstance(v, dict) else _scalar(v)) for v in value)
    return pad + _scalar(value)


def _readable(text: str) -> bool:
    """Whether block style gives exactly this text back: it begins at the margin and ends with at most one line end."""
    return all(line.isprintable() for line in text.split("\n")) and text[:1] not in ("", " ", "\n") and text[-2:] != "\n\n"


def _image(shape: Shape, site: Site) -> str:
    return site.image or ("linear-neox:cuda" if shape.gpus else "linear-neox:cpu")


def _variables(shape: Shape, site: Site) -> dict[str, str]:
    device = {} if shape.gpus else {"DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": str(site.cores(shape.gpus)), **device, **shape.variables}


def _not_there(shape: Shape) -> str:
    """A comment on what cannot be mounted."""
    return "".join(
        f"# The image must hold {path!a}: it lies in no folder that could be mounted.\n" for path in shape.places.files
    )


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
        # Kubernetes fills $(NAME) in; $$( is a plain $(
        "command": [*start, *(word.replace("$(", "$$(") for word in shape.command)],
        "ports": [{"containerPort": shape.port, "protocol": "TCP"}],
        "env": [*({"name": n, "value": v.replace("$(", "$$(")} for n, v in _variables(shape, site).items()), *secrets],
        "resources": {"requests": cores, "limits": {"nvidia.com/gpu": shape.slots}} if shape.gpus else {"limits": cores},
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": shape.save_s,  # a save may last so long; a pod that has ended is not waited for
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
            # All pods start again when one is lost; the run goes on from its last checkpoint. A mistake ends it.
            "failurePolicy": {"maxRestarts": 10, "rules": [final]},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": job}}],
        },
    }
    head = f"# Written by deepy.py --print-job kubernetes. Submit: kubectl apply -f THIS_FILE\n{_not_there(shape)}"
    names = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{shape.name}-configs"}}
    texts = to_yaml({**names, "data": {key: text for key, _, text in configs}}) + "\n---\n" if configs else ""
    return f"{head}{texts}{to_yaml(body)}\n"


def _sky_folders(shape: Shape, site: Site) -> tuple[dict[str, Any], str]:
    """(mounts, shell lines that put them where the configuration looks).

    One node writes through a cached bucket; several need one file system that all of them see, a network volume.
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
    """A task for `sky jobs launch`; the work folder is sent along, data and results lie in buckets or volumes."""
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
        # empty: not needed; `--secret NAME` fills one from the environment
        "secrets": dict.fromkeys(SECRETS, ""),
        "run": run,
    }
    submit = "# Written by deepy.py --print-job skypilot. Submit: sky jobs launch THIS_FILE [--secret WANDB_API_KEY]\n"
    return f"{submit}{_not_there(shape)}{to_yaml(body)}\n"
