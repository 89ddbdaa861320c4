"""What a job file is made of: the job's shape and places, and what only the command line can say of a cluster."""

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
    """name: of the run. nodes x slots processes; gpus: whether a slot is a GPU. command: script and arguments.

    places: what is read and written. save_s: the longest that a save may last. time_limit: the run's own, as in its key.
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
    """What only the command line can say of a cluster.

    image: container image. accelerator: SkyPilot's name of the device. time, partition: Slurm's. cpus: cores of each process.
    storage: beginning of the names of claims, volumes and buckets. python: the interpreter whose folder a Slurm job puts first.
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
    """Nodes and slots of a job: `num_nodes` x `num_gpus`, else as many slots as one copy of the model needs.

    Args:
        more: the other fields of `Shape`.

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
    return Shape(slug(name), nodes, slots, gpus, run_dir, command, options.master_port, **more)  # type: ignore[arg-type]
