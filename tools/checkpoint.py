"""Checkpoints from the command line: look into one, verify, compare, reshard, import.

    python tools/checkpoint.py inspect runs/x/checkpoints/global_step1000 [--tensors]
    python tools/checkpoint.py verify  runs/x                             every checkpoint of a run, every byte
    python tools/checkpoint.py diff    A B                                exit code 1 when they differ, as diff(1)
    python tools/checkpoint.py reshard A --output DIR --pp 2 --dp 1 --tp 2
    python tools/checkpoint.py import  NEOX/global_step1000 [a.yml ...] --output DIR

A PATH is a `global_step<N>` folder, or a save or run folder, whose newest is taken then. `import` reads
GPT-NeoX/DeepSpeed folders; without config files it takes those that lie in their `configs/`. It writes the step
that the files were saved at, into a folder of its own: never among the checkpoints of a run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import CheckpointError, exit_on_error


def inspect(args: argparse.Namespace) -> int:
    """Print a page about one checkpoint."""
    from megatron.checkpoint.find import newest_checkpoint
    from megatron.checkpoint.report import inspect as page

    print(page(newest_checkpoint(args.path), args.tensors))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read every byte of one checkpoint, or of all in a save or run folder; a damaged one decides the exit code."""
    from megatron.checkpoint.find import latest_problem, no_checkpoint, place_of
    from megatron.checkpoint.layout import LATEST, MANIFEST, iteration_of, step_folders
    from megatron.checkpoint.load import damages

    place = place_of(args.path)
    folders = list(step_folders(place).values())
    if not folders:
        if not place.is_dir() or (iteration_of(place.name) is None and not (place / MANIFEST).is_file()):
            raise no_checkpoint(place)
        folders = [place]
    bad, problem = 0, latest_problem(place)
    if problem:
        bad += 1
        print(f"{place / LATEST}: damaged\n  {problem}")
    for folder in folders:
        found = damages(folder)
        bad += bool(found)
        print(f"{folder}: {'damaged' if found else 'whole'}")
        for line in found:
            print(f"  {line}")
    return CheckpointError.exit_code if bad else 0


def diff(args: argparse.Namespace) -> int:
    """Print what differs between two checkpoints."""
    from megatron.checkpoint.find import newest_checkpoint
    from megatron.checkpoint.report import diff as lines

    count = 0
    for line in lines(newest_checkpoint(args.path), newest_checkpoint(args.other)):
        print(line)
        count += 1
    print(f"{count} differences" if count else "equal, bitwise")
    return 1 if count else 0


def reshard(args: argparse.Namespace) -> int:
    """Write a checkpoint again for another mesh."""
    from megatron.checkpoint.find import newest_checkpoint
    from megatron.checkpoint.offline_reshard import reshard as write

    made = write(newest_checkpoint(args.path), args.output, pp=args.pp, dp=args.dp, tp=args.tp)
    print(f"wrote {made}, cut for {args.pp} pipeline x {args.dp} data x {args.tp} tensor")
    return 0


def import_neox(args: argparse.Namespace) -> int:
    """Import the weights of a GPT-NeoX folder, and write a YAML that trains them on."""
    from megatron.checkpoint.find import refuse_to_mix
    from megatron.checkpoint.layout import iteration_of
    from megatron.checkpoint.save import save_weights
    from megatron.config.load import load_config
    from megatron.interop.neox import fitted, read_neox, vocabulary_rows
    from megatron.interop.neox_files import ForeignFolder, newest_foreign
    from megatron.model.build import param_specs
    from megatron.recipe import announcement, start_of_run
    from megatron.settings import model_config, tokenizer_records

    folder = ForeignFolder(newest_foreign(args.path.resolve()))
    named, saved = iteration_of(folder.path.name), folder.iteration()
    step = (named or 0) if saved is None else saved
    if named not in (None, step):
        print(f"the files of {folder.path} were saved at step {step}")
    refuse_to_mix(args.output, step)
    files = args.configs or list(folder.config_files())
    if not files:
        raise CheckpointError(
            "the model's YAML files are not known",
            where=str(folder.path),
            why="it has no folder configs/",
            hint="give them behind the path: tools/checkpoint.py import NEOX/global_step1000 model.yml --output DIR",
        )
    run = load_config(files, check=False)
    config = fitted(model_config(run, vocabulary_rows(folder)), folder)
    weights = dict(read_neox(folder, config))
    tokenizer, facts = tokenizer_records(run)
    made = save_weights(
        args.output,
        weights,
        param_specs(config),
        model_config=config.to_dict(),
        iteration=step,
        config_texts=run.config_texts,
        tokenizer=tokenizer,
        facts={"imported_from": f"GPT-NeoX, {folder.tp} tensor ranks", "seq_length": run.model.seq_length, **facts},
    )
    print(f"wrote {made}: weights of {config.num_layers} layers, joined from {folder.tp} tensor ranks")
    start = start_of_run(made, config, f"GPT-NeoX's {folder.path.name}", run)
    print(announcement(start))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, work: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(work=work)
        command.add_argument("path", type=Path, metavar="PATH")
        return command

    add("inspect", inspect, "what a checkpoint holds").add_argument("--tensors", action="store_true", help="a line per weight")
    add("verify", verify, "check every byte against the manifest")
    add("diff", diff, "compare two checkpoints, whatever their meshes").add_argument("other", type=Path, metavar="OTHER")
    command = add("reshard", reshard, "write a checkpoint again for another mesh")
    for axis, text in (("pp", "pipeline"), ("dp", "data"), ("tp", "tensor")):
        command.add_argument(f"--{axis}", type=int, default=1, help=f"{text} parallel size of the new files")
    command.add_argument("--output", type=Path, required=True, help="save folder to write into")
    command = add("import", import_neox, "import the weights of a GPT-NeoX/DeepSpeed folder")
    command.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="its YAML files")
    command.add_argument("--output", type=Path, required=True, help="save folder to write into")
    return parser


def main() -> None:
    """Parse and run one command."""
    with exit_on_error():
        args = make_parser().parse_args()
        raise SystemExit(args.work(args))


if __name__ == "__main__":
    main()
