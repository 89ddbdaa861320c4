"""Checkpoint -> verified Hugging Face folder, and its push to the Hub: the command for `megatron.export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import exit_on_error

if TYPE_CHECKING:
    from megatron.export.hub import Destination

_CARD = ("license", "license_name", "license_link", "language", "dataset", "eval_results", "metrics")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Export a checkpoint (any tensor x pipeline layout) for transformers, and push it to the Hub."
    )
    parser.add_argument("--checkpoint", type=Path, help="RUN/checkpoints/global_stepN, or RUN/checkpoints for its newest")
    parser.add_argument("--output", type=Path, help="new folder to write")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16 or float64")
    parser.add_argument("--max-shard-size", type=float, default=5.0, help="GB of weights per file")
    parser.add_argument("--keep-padding", action="store_true", help="keep the padding rows of the vocabulary")
    card = parser.add_argument_group("model card", "entries that the checkpoint does not contain; missing entries stay missing")
    card.add_argument("--license", metavar="ID", help="apache-2.0, mit, ...; other with --license-name")
    card.add_argument("--license-name", metavar="NAME", help="name of a license that the Hub does not list")
    card.add_argument("--license-link", metavar="URL", help="URL of that license")
    card.add_argument("--language", nargs="+", default=[], metavar="CODE", help="languages of the training text: en de, code")
    card.add_argument("--dataset", nargs="+", default=[], metavar="OWNER/NAME", help="training data on the Hub")
    card.add_argument("--eval-results", nargs="+", type=Path, default=[], metavar="JSON", help="files that eval.py wrote")
    card.add_argument("--metrics", type=Path, metavar="JSONL", help="metrics.jsonl of the run (beside the checkpoints' folder)")
    hub = parser.add_argument_group("Hub", "token: `hf auth login` or HF_TOKEN, never on the command line")
    hub.add_argument("--push-to-hub", metavar="REPO", help="OWNER/NAME, or NAME in your own namespace; created if needed")
    hub.add_argument("--folder", type=Path, help="push this folder, exported earlier, instead of exporting")
    hub.add_argument("--private", action="store_true", help="push to a private repository only")
    hub.add_argument("--revision", metavar="BRANCH", help="branch to commit to, created if needed (main)")
    hub.add_argument("--commit-message", metavar="TEXT", help="instead of one derived from the folder's name")
    hub.add_argument("--dry-run", action="store_true", help="export and compare, say what would be sent, send nothing")
    return parser


def _checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse combinations of options in which some would have no effect."""
    if arguments.folder is None and not (arguments.checkpoint and arguments.output):
        parser.error("give --checkpoint and --output, or --folder and --push-to-hub for a folder exported earlier")
    if arguments.folder is not None:
        exporting = ("checkpoint", "output", "keep_padding", *_CARD)
        used_options = [name for name in exporting if getattr(arguments, name)]
        used_options += [name for name in ("dtype", "max_shard_size") if getattr(arguments, name) != parser.get_default(name)]
        if used_options:
            option_list = ", ".join(f"--{name.replace('_', '-')}" for name in used_options)
            parser.error(f"--folder is pushed unchanged, {option_list} would have no effect (edit its README.md instead)")
    if not arguments.push_to_hub:
        of_hub = ("folder", "private", "revision", "commit_message", "dry_run")
        used_options = [f"--{name.replace('_', '-')}" for name in of_hub if getattr(arguments, name)]
        if used_options:
            parser.error(f"{', '.join(used_options)}: only together with --push-to-hub REPO")


def _export(arguments: argparse.Namespace) -> Path:
    """Export, say what was made."""
    from megatron.checkpoint.find import newest_checkpoint
    from megatron.export.card import CardInfo
    from megatron.export.hf import export_checkpoint
    from megatron.export.scores import read_scores
    from megatron.interop.hf_imports import import_model_classes

    checkpoint = newest_checkpoint(arguments.checkpoint)
    if checkpoint != arguments.checkpoint:
        print(f"checkpoint {checkpoint}", flush=True)
    stated = CardInfo(
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        languages=tuple(arguments.language),
        datasets=tuple(arguments.dataset),
        scores=read_scores(arguments.eval_results, checkpoint),
        metrics=arguments.metrics,
    )
    import_model_classes()
    result = export_checkpoint(
        checkpoint,
        arguments.output,
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_size * 1e9),
        keep_padding=arguments.keep_padding,
        stated=stated,
    )
    for note in result.notes:
        print(f"  {note}")
    print(f"wrote {result.folder} ({result.family}, {result.parameters:,} parameters)")
    print(f'load it: AutoModelForCausalLM.from_pretrained("{result.folder}"{_trust(result.folder)})')
    return result.folder


def _trust(folder: Path) -> str:
    return ", trust_remote_code=True" if any(folder.glob("*.py")) else ""


def _push(arguments: argparse.Namespace, destination: Destination) -> None:
    """Export where that is asked for, then send, or say what would be sent."""
    from megatron.export.hub import MAIN, describe, prepare, publish, sign_in

    early = None if arguments.folder is None else prepare(arguments.folder)
    api = None if arguments.dry_run else sign_in()  # before an export that may take an hour
    parcel = early or prepare(_export(arguments))
    print(describe(parcel, destination), flush=True)
    if api is None:
        print(f"dry run: nothing was sent; to send it: --folder {parcel.folder} --push-to-hub {destination.repo}")
        return
    done = publish(parcel, destination, api)
    if done.replaced or done.removed:
        print(f"{done.repo} was not empty: {len(done.replaced)} files replaced, removed: {', '.join(done.removed) or 'none'}")
    print(f"pushed to {done.url} ({'private' if done.private else 'public'})")
    branch = "" if destination.revision == MAIN else f', revision="{destination.revision}"'
    print(f'load it: AutoModelForCausalLM.from_pretrained("{done.repo}"{branch}{_trust(parcel.folder)})')


def main() -> None:
    """Parse the command line, export, publish."""
    parser = _parser()
    with exit_on_error():
        arguments = parser.parse_args()
        _checked(parser, arguments)
        if not arguments.push_to_hub:
            _export(arguments)
            return
        from megatron.export.hub import MAIN, Destination

        message = arguments.commit_message or ""
        _push(arguments, Destination(arguments.push_to_hub, arguments.private, arguments.revision or MAIN, message))


if __name__ == "__main__":
    main()
