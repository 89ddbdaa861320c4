"""Start a script on the processes that a configuration asks for: `deepy.py train.py -d configs metala.yml local_setup.yml`.

The habits are GPT-NeoX's. This command imports neither torch nor deepspeed: a mistake in the YAML shows in a fraction
of a second, and one process needs no launcher at all. `--print-launch` says what would be run, `--print-job` writes the same
job as a file for Slurm, Kubernetes or SkyPilot.
"""

from __future__ import annotations

import argparse
import getpass
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.cli import config_from_args, make_parser
from megatron.config.yaml_reader import find_config
from megatron.errors import LaunchError, exit_on_error
from megatron.launch.connectivity import addresses
from megatron.launch.exports import is_secret, user_file, withheld
from megatron.launch.hosts import find_pool
from megatron.launch.job import SYSTEM_HOSTFILE, Job, plan_job
from megatron.launch.job_shape import Site, shape_of
from megatron.launch.jobfiles import KINDS, job_file
from megatron.launch.lock import refuse_if_held
from megatron.launch.mounts import places_of, slug
from megatron.launch.options import LaunchOptions
from megatron.launch.preview import describe
from megatron.launch.runners import explain_failure, rendezvous_port, run_job, this_machine

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig


_TRAIN = str(Path(__file__).with_name("train.py"))
_STARTS_NOTHING = {"--dry-run", "--print-config", "--explain"}


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__ or "")
    parser.usage = "deepy.py SCRIPT CONFIG [CONFIG ...] [options], or deepy.py CONFIG [CONFIG ...] --dry-run"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "The flags of the script follow; `deepy.py SCRIPT --help` lists those of SCRIPT."
    parser.add_argument("--print-launch", action="store_true", help="print the command and environment of the job and stop")
    parser.add_argument("--print-job", choices=KINDS, help="print a job file for a cluster and stop")
    job = parser.add_argument_group("job files", "of --print-job, what the configuration does not know of a cluster")
    job.add_argument("--image", help="container image (kubernetes, skypilot)")
    job.add_argument("--cpu", action="store_true", help="for machines without GPUs")
    job.add_argument("--accelerator", default="H100", help="device type (skypilot; default H100)")
    job.add_argument("--time", help="time limit (slurm; default: that of the key time_limit and ten minutes)")
    job.add_argument("--partition", help="partition, or several with commas (slurm)")
    job.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of each process (default 4 beside a GPU, else 1)")
    job.add_argument(
        "--storage", help="beginning of the names of claims (linear-neox), or of buckets and volumes (... and you)"
    )
    return parser


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """(the script, its arguments): all but the script and the options of this command alone."""
    own = {"--print-launch": 0, "--print-job": 1, "--image": 1, "--accelerator": 1, "--cpu": 0}
    own |= {"--time": 1, "--partition": 1, "--cpus-per-task": 1, "--storage": 1}
    script, rest, skip = None, list[str](), 0
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
    if script is None and _STARTS_NOTHING & {word.partition("=")[0] for word in rest}:
        script = _TRAIN  # a plan, or a look at the configuration, is asked for without saying of what
    if script is None or not Path(script).is_file():
        raise LaunchError(
            f"no such script: {script or '(none given)'}", hint="python deepy.py train.py configs/metala-quickstart.yml"
        )
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


def _job_text(arguments: argparse.Namespace, run: RunConfig, options: LaunchOptions, command: tuple[str, ...]) -> str:
    """The file of --print-job."""
    files = [find_config(name, arguments.conf_dir) for name in arguments.conf_file]
    named = {name: os.environ[name] for name in options.export_env if name in os.environ}
    shape = shape_of(
        options,
        run.name,
        run.logging.run_dir,
        command,
        gpus=not arguments.cpu,
        places=places_of(run, [(str(path), path.read_text("utf-8")) for path in files]),
        save_s=int(run.reliability.hang_timeout) or 1800,  # a save that lasts longer counts as a hang
        time_limit=run.reliability.time_limit,
        variables={name: value for name, value in named.items() if not is_secret(name, value)},
    )
    owner = slug(f"linear-neox-{getpass.getuser()}" if arguments.print_job == "skypilot" else "linear-neox")
    site = Site(
        image=arguments.image,
        accelerator=arguments.accelerator,
        time=arguments.time,
        partition=arguments.partition,
        cpus=arguments.cpus_per_task,
        storage=arguments.storage or owner,
        python=sys.executable,
    )
    return job_file(arguments.print_job, options, shape, site)


def _print_help(argv: list[str]) -> None:
    """Every flag that the command takes: its own, and those of the script (train.py where none is named).

    A script is asked for its flags if it is one of ours, which answer --help alike.
    """
    _parser().print_help()
    script = next((word for word in argv if word.endswith(".py") and Path(word).is_file()), _TRAIN)
    if Path(script).resolve().parent == Path(__file__).resolve().parent:
        print(f"\n{Path(script).name} takes these as well:\n", flush=True)
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
        print(_job_text(arguments, run, options, (script, *rest)), end="")
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
        port=rendezvous_port(options, run.provenance.get("master_port", "default") != "default", len(pool or ())),
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
        if run.checkpoint.save and Path(script).resolve() == Path(_TRAIN).resolve():  # others read while a run saves
            refuse_if_held(run.checkpoint.save)
    code, first = run_job(_ready(job, options))
    if code:
        print(f"error: {explain_failure(job, code)}", file=sys.stderr)
        if first:
            print(f"the first error of the job:\n{first}", file=sys.stderr)
    return code


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(main(sys.argv[1:]))
