"""The config part of every command line: YAML files, `-d DIR`, `--set KEY=VALUE`, and NeoX's own flags.

Each command adds these arguments to its parser, so `train.py`, `deepy.py` and the tools read a configuration in the
same way. Whatever is given on the command line beats the files.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from megatron.config.explain import explain, print_config
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.errors import ConfigError

# NeoX's flags (those of its deepy.py), then those of DeepSpeed's launcher -> the key they set is the name without dashes.
_FLAGS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("--wandb_group",), {"help": "group of the W&B run"}),
    (("--wandb_run_name",), {"help": "name of the W&B run"}),
    (("--wandb_team",), {"help": "team of the W&B run"}),
    (("--eval_tasks",), {"nargs": "+", "help": "evaluation tasks", "metavar": "TASK"}),
    (("--iteration",), {"type": int, "help": "step of the checkpoint to load (default: the latest)"}),
    (("--eval_results_prefix",), {"help": "beginning of the evaluation's file name"}),
    (("-H", "--hostfile"), {"help": "file with one `host slots=N` per line"}),
    (("-i", "--sample_input_file"), {"help": "file with one prompt per line"}),
    (("-o", "--sample_output_file"), {"help": "where generated samples go"}),
    (("--launcher",), {"help": "pdsh, openmpi, mpich, slurm, torchrun or none"}),
    (("--launcher_args",), {"help": "more arguments for the launcher, as one string: --launcher_args='...'"}),
    (("--include",), {"help": "hosts and slots to use: host1@host2:0,2"}),
    (("--exclude",), {"help": "hosts and slots to leave out"}),
    (("--num_nodes",), {"type": int, "help": "the first so many hosts"}),
    (("--num_gpus",), {"type": int, "help": "processes on each host"}),
    (("--master_addr",), {"help": "where rank 0 listens"}),
    (("--master_port",), {"type": int, "help": "its port"}),
)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the config arguments; abbreviations are off, so a typo is never taken for another flag."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add_config_arguments(parser)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config files, `-d`, `--set`, `--print-config`, `--explain` and NeoX's flags to `parser`."""
    parser.allow_abbrev = False
    parser.add_argument("conf_file", nargs="*", metavar="CONFIG", help="YAML (or .json) files; `.yml` may be left out")
    parser.add_argument("-d", "--conf_dir", "--conf-dir", metavar="DIR", help="folder joined in front of each file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key (repeatable); dots reach into dictionaries: --set optimizer.params.lr=3e-4",
    )
    parser.add_argument("--print-config", action="store_true", help="print the merged config with its origins and stop")
    parser.add_argument("--explain", metavar="KEY", help="say what a key means and where it is set, and stop")
    for names, options in _FLAGS:
        # NeoX spells flags with underscores; hyphens are what people type.
        hyphens = [n.replace("_", "-") for n in names if "_" in n]
        parser.add_argument(*names, *hyphens, **options)


def overrides_from_args(ns: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The overriding values and, for flags, the label that provenance shows. `--set` beats a flag."""
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for names, _ in _FLAGS:
        key = names[-1].removeprefix("--")
        value = getattr(ns, key, None)
        if value is not None:
            values[key], labels[key] = value, names[-1]
    for item in ns.overrides:
        key, equals, text = str(item).partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {item!r} is not KEY=VALUE", hint="for example --set train_iters=100")
        labels.pop(key.strip(), None)
        values[key.strip()] = text
    return values, labels


def config_from_args(ns: argparse.Namespace, world_size: int | None = None, *, check: bool = True) -> RunConfig:
    """The configuration of a parsed command line. `--explain` and `--print-config` print and end the process here.

    `--print-config` shows what was read also of a configuration that is refused, and then refuses it as a plan would.

    Raises:
        ConfigError: something in the files or flags is wrong.
    """
    overrides, labels = overrides_from_args(ns)
    if ns.explain:
        print(explain(ns.explain, _run_or_none(ns, overrides, labels, world_size)))
        raise SystemExit(0)

    def load(world_size: int | None, check: bool) -> RunConfig:
        return load_config(
            ns.conf_file,
            conf_dir=ns.conf_dir,
            overrides=overrides,
            world_size=world_size,
            check=check,
            override_labels=labels,
        )

    run = load(world_size, check and not ns.print_config)
    if ns.print_config:
        sys.stdout.write(print_config(run))
        if check:
            load(planned_world(run), check=True)
        raise SystemExit(0)
    return run


def planned_world(run: RunConfig) -> int:
    """Processes of a plan: `global_num_gpus`, else num_nodes x num_gpus, else what one copy of the model needs."""
    asked = (run.launch.num_gpus or 0) * max(1, run.launch.num_nodes)
    return run.world_size or asked or run.parallel.pipe_stages * run.parallel.tensor_ranks


def _run_or_none(
    ns: argparse.Namespace, overrides: dict[str, Any], labels: dict[str, str], world_size: int | None
) -> RunConfig | None:
    """For `--explain`: the configuration if there is a readable one."""
    run = None
    if ns.conf_file:
        with contextlib.suppress(ConfigError):
            run = load_config(
                ns.conf_file,
                conf_dir=ns.conf_dir,
                overrides=overrides,
                world_size=world_size,
                check=False,
                override_labels=labels,
            )
    return run
