"""The inputs of a job file: the job's shape and paths, and the cluster's settings from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.errors import ConfigError
from megatron.launch.mounts import Places, slug
from megatron.launch.options import LaunchOptions

AGAIN = (21, 22, 75)
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
_CPUS_PER_GPU = 4


@dataclass(frozen=True)
class Shape:
    """A job: `nodes` x `slots` processes.

    Attributes:
        name: of the run.
        nodes: number of nodes.
        slots: processes per node.
        gpus: a slot is a GPU.
        run_dir: folder of the run.
        command: script and arguments.
        port: rendezvous port.
        places: paths that are read and written.
        save_s: seconds that a save may take at most.
        time_limit: the run's own limit, as in its key.
        variables: of `export_env`, for the ranks.
    """

    name: str
    nodes: int
    slots: int
    gpus: bool
    run_dir: str
    command: tuple[str, ...]
    port: int
    places: Places = field(default_factory=Places)
    save_s: int = 1800
    time_limit: str | float | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """Settings of a cluster, from the command line.

    Attributes:
        image: container image.
        accelerator: SkyPilot's name of the device.
        time: Slurm's time limit.
        partition: Slurm's partition.
        cpus: cores of each process.
        storage: prefix of the names of claims, volumes and buckets.
        python: the interpreter whose folder a Slurm job puts first on PATH.
    """

    image: str | None = None
    accelerator: str = "H100"
    time: str | None = None
    partition: str | None = None
    cpus: int | None = None
    storage: str = "linear-neox"
    python: str | None = None

    def cores(self, gpus: bool) -> int:
        """Cores of each process."""
        return self.cpus or (_CPUS_PER_GPU if gpus else 1)


def shape_of(options: LaunchOptions, name: str, run_dir: str, command: tuple[str, ...], gpus: bool, **more: object) -> Shape:
    """Nodes and slots of a job: `num_nodes` x `num_gpus`, else the size of one model replica.

    Args:
        options: launch keys.
        name: of the run.
        run_dir: folder of the run.
        command: script and arguments.
        gpus: a slot is a GPU.
        more: the other fields of `Shape`.

    Raises:
        ConfigError: the mesh does not fit into the processes.
    """
    nodes = max(1, options.num_nodes)
    slots = options.num_gpus or -(-options.model_processes // nodes)
    if nodes * slots % options.model_processes:
        raise ConfigError(
            f"{nodes} nodes x {slots} slots cannot hold {options.mesh_text}",
            hint="set num_nodes and num_gpus",
        )
    return Shape(slug(name), nodes, slots, gpus, run_dir, command, options.master_port, **more)  # type: ignore[arg-type]
