"""Measure a trained model: `python eval.py CONFIG... --eval_tasks perplexity [--eval_lengths 512 1024] [--eval_stride 64]`.

The checkpoint is the one that the config's `load` (else `save`) names, of any mesh; the model runs in this one process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.cli import config_from_args, make_parser
from megatron.errors import ConfigError, DataError, exit_on_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megatron.config.schema import RunConfig
    from megatron.data.tokenizers import Tokenizer
    from megatron.model.lm import LanguageModel


def _opened(run: RunConfig) -> tuple[LanguageModel, Tokenizer, Path]:
    """Model, tokenizer and checkpoint of a configuration."""
    import torch

    from megatron.checkpoint.find import find_checkpoint
    from megatron.generation.load import load_model, stored_tokenizer
    from megatron.settings import tokenizer_of

    folder = run.checkpoint.load or run.checkpoint.save
    if folder is None:
        raise ConfigError("no checkpoint is named", hint="set load, for example --set load=runs/NAME/checkpoints")
    checkpoint = find_checkpoint(folder, run.checkpoint.iteration)
    assert checkpoint is not None  # None is the fresh start of a training run, which needs a save folder
    on_gpu = torch.cuda.is_available()
    model, manifest = load_model(checkpoint, dtype=None if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu")
    kept = stored_tokenizer(checkpoint / "tokenizer", (manifest.facts.get("tokenizer") or {}).get("type"))
    return model, kept or tokenizer_of(run), checkpoint


def _tokens(run: RunConfig) -> NDArray[Any]:
    """The split's tokens."""
    from megatron.evaluation.stream import corpora_tokens, split_tokens

    data, name, limit = run.data, run.evaluation.eval_split, run.evaluation.eval_limit
    if data.data_path is not None:
        return split_tokens(data.data_path, data.split, name, limit)
    paths = getattr(data, f"{name}_data_paths")
    if not paths:
        raise DataError("no data is named", hint=f"set data_path, or {name}_data_paths")
    return corpora_tokens(paths, limit)


def perplexity(run: RunConfig) -> None:
    """Perplexity at every length, as a table, JSON and PNG."""
    from megatron.evaluation.perplexity import score
    from megatron.evaluation.report import plot_lengths, table
    from megatron.evaluation.stream import measured
    from megatron.files import write_json

    asked = run.evaluation
    model, tokenizer, checkpoint = _opened(run)
    stream = measured(_tokens(run), tokenizer)
    print(f"checkpoint {checkpoint}; {len(stream.tokens):,} tokens, {stream.words:,} words, {stream.size:,} bytes", flush=True)
    rows: list[dict[str, Any]] = []
    for length in asked.eval_lengths or (run.model.seq_length,):
        stride = min(asked.eval_stride or length, length)
        try:
            found = score(model, stream.tokens, tokenizer.eod, length, stride, backend=run.training.kernel_backend)
            rows.append(found.report(stream.words, stream.size))
        except ValueError as error:  # learned positions end somewhere
            rows.append({"length": length, "stride": stride, "error": str(error)})
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[1], flush=True)
    stem = asked.eval_results_prefix or str(Path(run.logging.run_dir) / "eval")
    stem += f"_perplexity_{asked.eval_split}_{time.strftime('%Y%m%d-%H%M%S')}"
    facts = {
        "task": "perplexity",
        "checkpoint": str(checkpoint),
        "split": asked.eval_split,
        "trained_length": run.model.seq_length,
    }
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    write_json(
        f"{stem}.json", {**facts, "tokens": len(stream.tokens), "words": stream.words, "bytes": stream.size, "rows": rows}
    )
    print(f"wrote {stem}.json")
    if len(rows) > 1:
        try:
            print(f"wrote {plot_lengths({run.name: rows}, f'{stem}.png', run.name, run.model.seq_length)}")
        except DataError as error:
            print(error.what)


TASKS: dict[str, Callable[[RunConfig], None]] = {"perplexity": perplexity}


def main(argv: list[str]) -> None:
    """The command; only the first process works when a launcher started several."""
    parser = make_parser("Measure a trained model.")
    parser.add_argument("--eval_lengths", "--eval-lengths", nargs="+", metavar="N", help="tokens that a pass reads at most")
    parser.add_argument("--eval_stride", "--eval-stride", metavar="N", help="tokens scored per pass (sliding evaluation)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.eval_lengths:
        arguments.overrides.append(f"eval_lengths=[{', '.join(arguments.eval_lengths)}]")
    if arguments.eval_stride:
        arguments.overrides.append(f"eval_stride={arguments.eval_stride}")
    if os.environ.get("RANK", "0") != "0":
        return
    run = config_from_args(arguments, check=False)
    tasks = run.evaluation.eval_tasks or ()
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        what = f"unknown evaluation task '{unknown[0]}'" if unknown else "no evaluation task is named"
        raise ConfigError(what, hint=f"--eval_tasks {' '.join(TASKS)}")
    for name in tasks:
        TASKS[name](run)


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
