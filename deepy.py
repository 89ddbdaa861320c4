"""Start a script on the processes that a configuration asks for: `python deepy.py train.py configs/metala.yml`.

The habits are GPT-NeoX's. This command imports neither torch nor deepspeed: a mistake in the YAML shows in a fraction
of a second, and one process needs no launcher at all. `--print-command` says what would be run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron.config.cli import config_from_args, make_parser
from megatron.errors import LaunchError, exit_on_error
from megatron.launch.job import LaunchOptions, plan_job
from megatron.launch.runners import explain_failure, run_job, this_machine, usable_port


def main(argv: list[str]) -> int:
    """Read the configuration, plan the job, run it; the job's exit code."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--print-command", action="store_true", help="print the command of the job and stop")
    script = next((word for word in argv if word.endswith(".py")), None)
    rest = [word for word in argv if word is not script and word != "--print-command"]
    arguments, _ = parser.parse_known_intermixed_args([word for word in argv if word is not script])
    if script is None or not Path(script).is_file():
        raise LaunchError(f"no such script: {script or '(none given)'}", hint="python deepy.py train.py configs/metala.yml")
    run = config_from_args(arguments)
    options = LaunchOptions.from_sections(run.launch, run.parallel)
    job = plan_job(options, this_machine(), script, rest, port=usable_port(options.master_port), alone="--dry-run" in rest)
    if arguments.print_command:
        print(job.describe())
        return 0
    config_from_args(arguments, world_size=job.processes)  # batch sizes and mesh are checked before anything starts
    code = run_job(job)
    if code:
        print(f"error: {explain_failure(job, code)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(main(sys.argv[1:]))
