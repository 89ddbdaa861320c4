"""Train: `python train.py configs/x.yml` for one process; `deepy.py` or `torchrun` start this file on many.

`--dry-run` prints the warnings of a start, what the run needs and whether it fits, and starts nothing.
"""

from __future__ import annotations

import sys

from megatron.config.checks import require_data
from megatron.config.cli import config_from_args, make_parser, planned_world
from megatron.errors import exit_on_error
from megatron.launch.environment import read_rank_environment
from megatron.launch.process_exit import leaving


def main(argv: list[str]) -> int:
    """Read the configuration on this rank, then train; returns the exit code."""
    parser = make_parser("Train a language model from YAML files.")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory, start nothing")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="memory of one rank for --dry-run")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the device's peak for --dry-run's time (default 0.4)")
    arguments = parser.parse_intermixed_args(argv)
    env = read_rank_environment()
    starts = not (arguments.dry_run or arguments.print_config)
    run = config_from_args(arguments, world_size=env.world_size if starts else None)
    if not run.world_size:
        run = config_from_args(arguments, world_size=planned_world(run))
    from megatron.assemble import dry_run, train
    from megatron.planning.dry_run import DOES_NOT_FIT

    if arguments.dry_run:
        for line in run.warnings:
            print(f"warning: {line}")
        report = dry_run(run, arguments.device_memory, arguments.mfu)
        print(report.text)
        return 0 if report.fits or not report.binding else DOES_NOT_FIT
    require_data(run)
    return train(run, env, ["python", *sys.argv]).exit_code


if __name__ == "__main__":
    with leaving(), exit_on_error(screen_is_result=False):
        if code := main(sys.argv[1:]):
            raise SystemExit(code)
