"""Start a script on the processes that a configuration asks for: `python deepy.py train.py configs/metala.yml`.

The habits are GPT-NeoX's. This command imports neither torch nor deepspeed: a mistake in the YAML shows in a fraction
of a second, and one process needs no launcher at all. `--print-launch` says what would be run, `--print-job` writes the same
job as a file for Slurm, Kubernetes or SkyPilot.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from megatron.config.cli import config_from_args, make_parser
from megatron.errors import LaunchError, exit_on_error
from megatron.launch.exports import user_file, withheld
from megatron.launch.hosts import find_pool
from megatron.launch.job import SYSTEM_HOSTFILE, Job, plan_job
from megatron.launch.jobfiles import KINDS, job_file, shape_of
from megatron.launch.options import LaunchOptions
from megatron.launch.preview import describe
from megatron.launch.reach import addresses
from megatron.launch.runners import explain_failure, run_job, this_machine, usable_port


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__ or "")
    parser.usage = "deepy.py SCRIPT CONFIG [CONFIG ...] [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "`deepy.py SCRIPT --help` lists the flags of SCRIPT as well, such as --dry-run of train.py."
    parser.add_argument("--print-launch", action="store_true", help="print the command and environment of the job and stop")
    parser.add_argument("--print-job", choices=KINDS, help="print a job file for a cluster and stop")
    parser.add_argument("--image", default=None, help="container image of --print-job kubernetes and skypilot")
    parser.add_argument("--cpu", action="store_true", help="--print-job for machines without GPUs")
    parser.add_argument("--accelerator", default="H100", help="device type of --print-job skypilot (default H100)")
    return parser


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """(the script, its arguments): all but the script and the options of this command alone."""
    own = {"--print-launch": 0, "--print-job": 1, "--image": 1, "--accelerator": 1, "--cpu": 0}
    script, rest, skip = None, [], 0
    for word in argv:
        name = word.partition("=")[0]
        if skip:
            skip -= 1
        elif name in own:
            skip = own[name] if "=" not in word else 0
        elif script is None and word.endswith(".py"):
            script = word
        else:
            rest.append(word)
    if script is None or not Path(script).is_file():
        raise LaunchError(f"no such script: {script or '(none given)'}", hint="python deepy.py train.py configs/metala.yml")
    return script, rest


def _ready(job: Job, options: LaunchOptions) -> Job:
    """The job with every host reached and the address of rank 0 known."""
    if job.route != "hosts" or job.launcher == "slurm":
        return job
    asked = list(job.hosts) if not options.no_ssh_check else [h for h in (job.address_from,) if h]
    found = addresses(asked)
    for name in withheld(os.environ):
        print(f"warning: {name} is set here and is not sent to the hosts (it would stand on a command line)", file=sys.stderr)
    return job.with_address(found[job.address_from]) if job.address_from else job


def _print_help(argv: list[str]) -> None:
    """Every flag that the command takes: its own, and those of the script if it is one of ours (which answer --help alike)."""
    _parser().print_help()
    script = next((word for word in argv if word.endswith(".py") and Path(word).is_file()), None)
    if script is not None and Path(script).resolve().parent == Path(__file__).resolve().parent:
        print(f"\n{script} takes these as well:\n", flush=True)
        subprocess.run([sys.executable, script, "--help"], check=False)


def main(argv: list[str]) -> int:
    """Read the configuration, plan the job, run it; the job's exit code."""
    if {"-h", "--help"} & set(argv):
        _print_help(argv)
        return 0
    script, rest = _split(argv)
    arguments, _ = _parser().parse_known_intermixed_args([word for word in argv if word is not script])
    run = config_from_args(arguments)
    options = LaunchOptions.from_sections(run.launch, run.parallel)
    if arguments.print_job:
        shape = shape_of(options, run.name, run.logging.run_dir, (script, *rest), gpus=not arguments.cpu)
        print(job_file(arguments.print_job, options, shape, arguments.image, arguments.accelerator), end="")
        return 0
    alone = "--dry-run" in rest
    pool, missing = find_pool(options.hostfile, (os.environ.get("DLTS_HOSTFILE"), SYSTEM_HOSTFILE))
    if missing:
        print(f"warning: {missing}", file=sys.stderr)
        options = replace(options, hostfile=None)
    job = plan_job(
        options,
        this_machine(),
        script,
        rest,
        port=usable_port(options.master_port),
        pool=pool,
        environ={**os.environ, **user_file(os.environ, Path.home())},
        scratch=f"{run.logging.run_dir}/launch",
        alone=alone,
    )
    if arguments.print_launch:
        print(describe(job))
        return 0
    if not alone:  # a plan is for the mesh that it names, not for the one process that makes it
        config_from_args(arguments, world_size=job.processes)  # batch sizes and mesh are checked before anything starts
    code, first = run_job(_ready(job, options))
    if code:
        print(f"error: {explain_failure(job, code)}", file=sys.stderr)
        if first:
            print(f"the first error of the job:\n{first}", file=sys.stderr)
    return code


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(main(sys.argv[1:]))
