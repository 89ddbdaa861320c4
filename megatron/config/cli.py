"""The config part of every command line: YAML files, `-d DIR`, `--set KEY=VALUE`, and NeoX's own flags.

Each command adds these arguments to its parser, and all of them read a configuration alike. The command line overrides files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from typing import Any

from megatron.config.explain import explain, print_config
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.errors import ConfigError

# Flags of NeoX's deepy.py, then those of DeepSpeed's launcher. The last name without dashes is the key.
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
    (("--num_nodes",), {"type": int, "help": "use the first N hosts"}),
    (("--num_gpus",), {"type": int, "help": "processes on each host"}),
    (("--master_addr",), {"help": "where rank 0 listens"}),
    (("--master_port",), {"type": int, "help": "its port"}),
)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the config arguments."""
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config files, `-d`, `--set`, `--print-config`, `--explain` and NeoX's flags to `parser`."""
    parser.allow_abbrev = False  # a typo must not be taken for another flag
    add = parser.add_argument
    add("conf_file", nargs="*", metavar="CONFIG", help="YAML (or .json) files; `.yml` may be left out")
    add("-d", "--conf_dir", "--conf-dir", metavar="DIR", help="folder joined in front of each file")
    override = "override one key (repeatable); dots reach into dictionaries: --set optimizer.params.lr=3e-4"
    add("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=override)
    add("--print-config", action="store_true", help="print the merged config with its origins and stop")
    add("--explain", metavar="KEY", help="say what a key means and where it is set, and stop")
    for names, options in _FLAGS:
        # NeoX spells flags with underscores; hyphens are what people type.
        add(*names, *[name.replace("_", "-") for name in names if "_" in name], **options)


def overrides_from_args(ns: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The overriding values and, for flags, the label that provenance shows. `--set` overrides a flag."""
    keys = {names[-1].removeprefix("--"): names[-1] for names, _ in _FLAGS}
    values = {key: getattr(ns, key) for key in keys if getattr(ns, key, None) is not None}
    labels = {key: keys[key] for key in values}
    for item in ns.overrides:
        key, equals, text = str(item).partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {item!r} is not KEY=VALUE", hint="for example --set train_iters=100")
        labels.pop(key.strip(), None)
        values[key.strip()] = text
    return values, labels


def config_from_args(ns: argparse.Namespace, world_size: int | None = None, *, check: bool = True) -> RunConfig:
    """The configuration of a parsed command line. `--explain` and `--print-config` print and end the process here.

    `--print-config` also shows a configuration that is refused, and then refuses it as a dry run would.

    Args:
        ns: the parsed arguments.
        world_size: number of processes, if known.
        check: also refuse what is not built and apply the cross rules.

    Raises:
        ConfigError: something in the files or flags is wrong.
    """
    overrides, labels = overrides_from_args(ns)
    load = functools.partial(load_config, ns.conf_file, conf_dir=ns.conf_dir, overrides=overrides, override_labels=labels)
    if ns.explain:
        run = None
        if ns.conf_file:
            with contextlib.suppress(ConfigError):  # a key can be explained without a readable configuration
                run = load(world_size=world_size, check=False)
        print(explain(ns.explain, run))
        raise SystemExit(0)
    run = load(world_size=world_size, check=check and not ns.print_config)
    if ns.print_config:
        sys.stdout.write(print_config(run))
        if check:
            load(world_size=planned_world(run), check=True)
        raise SystemExit(0)
    return run


def planned_world(run: RunConfig) -> int:
    """Processes of a plan: `global_num_gpus`, else num_nodes x num_gpus, else what one sequence needs."""
    requested = (run.launch.num_gpus or 0) * max(1, run.launch.num_nodes)
    return run.world_size or requested or run.parallel.model_processes
