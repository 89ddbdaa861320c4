"""Evaluate a trained model: `python eval.py CONFIG... --eval_tasks perplexity [--eval_lengths 512 1024] [--eval_stride 64]`, or
`--eval_tasks synthetic [--eval_lengths 64 128]` for the configuration's synthetic task, or
`--eval_tasks perplexity_by_length niah_single_1 niah ... [--lengths 1024,4096] [--depths 0,0.5,1]` for long contexts, or
`--eval_tasks piqa,hellaswag based_fda_twice recall ... [--data-dir DIR] [--limit N]` for tasks of lm-eval (docs/evaluation.md).

The checkpoint is that of the config's `load` (else `save`), of any mesh. A single process loads the complete model; on
several (`python deepy.py eval.py CONFIG`), lm-eval tasks run on the config's pipeline and tensor ranks, with data-parallel
replicas.
"""

from __future__ import annotations

import difflib
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.cli import config_from_args, make_parser
from megatron.errors import ConfigError, DataError, exit_on_error
from megatron.launch.environment import RankEnvironment, close_process_group, init_process_group, read_rank_environment
from megatron.launch.process_exit import leaving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from megatron.checkpoint.manifest import Manifest
    from megatron.config.schema import RunConfig
    from megatron.data.tokenizers import Tokenizer
    from megatron.evaluation.forward import Forward
    from megatron.evaluation.long_context import Documents
    from megatron.evaluation.options import HarnessOptions, Request
    from megatron.model.config import ModelConfig
    from megatron.model.lm import LanguageModel


def _checkpoint(run: RunConfig) -> Path:
    """The checkpoint that the configuration names."""
    from megatron.checkpoint.find import find_checkpoint

    folder = run.checkpoint.load or run.checkpoint.save
    if folder is None:
        raise ConfigError("there is no checkpoint to load", hint="set load, for example --set load=runs/NAME/checkpoints")
    checkpoint = find_checkpoint(folder, run.checkpoint.iteration)
    assert checkpoint is not None  # None only for a fresh training run
    return checkpoint


def _tokenizer(run: RunConfig, checkpoint: Path, manifest: Manifest) -> Tokenizer:
    """The checkpoint's own tokenizer, else the configuration's."""
    from megatron.generation.load import stored_tokenizer
    from megatron.settings import tokenizer_of

    tokenizer = stored_tokenizer(checkpoint / "tokenizer", (manifest.facts.get("tokenizer") or {}).get("type"))
    return tokenizer or tokenizer_of(run)


def _opened(run: RunConfig) -> tuple[LanguageModel, Tokenizer, Path]:
    """Load model, tokenizer and checkpoint of a configuration."""
    import torch

    from megatron.generation.load import load_model

    checkpoint, on_gpu = _checkpoint(run), torch.cuda.is_available()
    model, manifest = load_model(checkpoint, dtype=None if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu")
    return model, _tokenizer(run, checkpoint, manifest), checkpoint


def _tokens(run: RunConfig) -> NDArray[Any]:
    """The split's tokens."""
    from megatron.evaluation.documents import corpora_tokens, split_tokens

    data, name, limit = run.data, run.evaluation.eval_split, run.evaluation.eval_limit
    if data.data_path is not None:
        return split_tokens(data.data_path, data.split, name, limit)
    paths = getattr(data, f"{name}_data_paths")
    if not paths:
        raise DataError("there are no data", hint=f"set data_path, or {name}_data_paths")
    return corpora_tokens(paths, limit)


def perplexity(run: RunConfig) -> None:
    """Perplexity at every length, as a table, JSON and PNG."""
    from megatron.evaluation.documents import measured
    from megatron.evaluation.perplexity import score
    from megatron.evaluation.report import plot_lengths, table
    from megatron.files import write_json

    options = run.evaluation
    model, tokenizer, checkpoint = _opened(run)
    stream = measured(_tokens(run), tokenizer)
    print(f"checkpoint {checkpoint}; {len(stream.tokens):,} tokens, {stream.words:,} words, {stream.size:,} bytes", flush=True)
    rows: list[dict[str, Any]] = []
    for length in options.eval_lengths or (run.model.seq_length,):
        stride = min(options.eval_stride or length, length)
        try:
            score_options: dict[str, Any] = {"backend": run.training.kernel_backend, "vocab_size": tokenizer.vocab_size}
            result = score(model, stream.tokens, tokenizer.eod, length, stride, **score_options)
            rows.append(result.report(stream.words, stream.size))
        except ValueError as error:  # longer than the learned positions
            rows.append({"length": length, "stride": stride, "error": str(error)})
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[1], flush=True)
    stem = _stem(run, f"perplexity_{options.eval_split}")
    facts = {
        "task": "perplexity",
        "checkpoint": str(checkpoint),
        "split": options.eval_split,
        "trained_length": run.model.seq_length,
    }
    write_json(
        f"{stem}.json", {**facts, "tokens": len(stream.tokens), "words": stream.words, "bytes": stream.size, "rows": rows}
    )
    print(f"wrote {stem}.json")
    if len(rows) > 1:
        _drawn(lambda: plot_lengths({run.name: rows}, f"{stem}.png", run.name, run.model.seq_length))


def perplexity_by_length(run: RunConfig) -> None:
    """Loss over the position in long documents, as a table, JSON and PNG."""
    from megatron.evaluation.long_context import measure_by_length
    from megatron.evaluation.long_documents import default_lengths
    from megatron.evaluation.report import plot_positions

    options, trained = run.evaluation, run.model.seq_length
    model, tokenizer, checkpoint = _opened(run)
    lengths = options.eval_lengths or default_lengths(trained)
    settings: dict[str, Any] = {"limit": options.eval_limit, "backend": run.training.kernel_backend}
    result = measure_by_length(model, tokenizer, lengths, _documents(run, tokenizer), **settings)
    draw = partial(plot_positions, {run.name: result["rows"]}, title=run.name, trained=trained)
    _store(run, "perplexity_by_length", checkpoint, result, draw)


def needles(run: RunConfig, names: Sequence[str]) -> None:
    """Needle prompts over length and depth, as tables, JSON and PNG."""
    from megatron.evaluation.ladder import DEPTHS, EXAMPLES, LENGTHS, Plan
    from megatron.evaluation.long_context import measure_needles
    from megatron.evaluation.report import plot_ladder

    options = run.evaluation
    lengths, depths = tuple(sorted(options.eval_lengths or LENGTHS)), options.eval_depths or DEPTHS
    plan = Plan(lengths, depths, options.eval_limit or EXAMPLES, run.training.seed)
    model, tokenizer, checkpoint = _opened(run)
    settings: dict[str, Any] = {"spec": run.data.synthetic, "backend": run.training.kernel_backend}
    result = measure_needles(model, tokenizer, names, plan, _documents(run, tokenizer), **settings)
    _store(run, "needles", checkpoint, result, partial(plot_ladder, {run.name: result["rows"]}, title=run.name))


def _documents(run: RunConfig, tokenizer: Tokenizer) -> Documents:
    """Opens eval_text, else the split of the corpus."""
    from megatron.evaluation.documents import run_documents

    data, name = run.data, run.evaluation.eval_split
    paths = getattr(data, f"{name}_data_paths")
    return partial(run_documents, run.evaluation.eval_text, data.data_path, data.split, name, paths, tokenizer)


def _store(run: RunConfig, task: str, checkpoint: Path, result: dict[str, Any], draw: Callable[..., Path]) -> None:
    """Write the JSON and the PNG of a long-context measure."""
    from megatron.files import write_json

    stem = _stem(run, task)
    facts = {"task": task, "model": run.name, "checkpoint": str(checkpoint), "trained_length": run.model.seq_length}
    write_json(f"{stem}.json", {**facts, **result})
    print(f"wrote {stem}.json")
    _drawn(lambda: draw(image=f"{stem}.png"))


def _drawn(draw: Callable[[], Path]) -> None:
    """Draw a figure if matplotlib is installed."""
    try:
        print(f"wrote {draw()}")
    except DataError as error:
        print(error.what)


def synthetic(run: RunConfig) -> None:
    """Accuracy on the test slices of the configuration's synthetic task, as a table, JSON and, over lengths, PNG."""
    from megatron.evaluation.synthetic_accuracy import accuracy_table, evaluated_slices, measure_slices, plot_accuracy
    from megatron.files import write_json

    options, trained = run.evaluation, run.model.seq_length
    model, tokenizer, checkpoint = _opened(run)
    slices = evaluated_slices(run.data.synthetic, tokenizer, options.eval_lengths, options.eval_limit)
    rows = measure_slices(model, slices, run.training.seed, run.training.kernel_backend)
    print(f"checkpoint {checkpoint}\n{accuracy_table(rows)}", flush=True)
    stem = _stem(run, "synthetic")
    facts = {"task": slices[0].task.name, "model": run.name, "checkpoint": str(checkpoint), "trained_length": trained}
    write_json(f"{stem}.json", {**facts, "rows": rows})
    print(f"wrote {stem}.json")
    if len({row["tokens"] for row in rows if "error" not in row}) > 1:
        _drawn(lambda: plot_accuracy(rows, f"{stem}.png", run.name, trained))


def _stem(run: RunConfig, kind: str) -> str:
    """Path of the results without suffix; creates the folder."""
    stem = run.evaluation.eval_results_prefix or str(Path(run.logging.run_dir) / "eval")
    stem += f"_{kind}_{time.strftime('%Y%m%d-%H%M%S')}"
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    return stem


def harness(run: RunConfig, names: Sequence[str], env: RankEnvironment) -> None:
    """Evaluate lm-eval tasks on all processes of the job; prints and stores the scores."""
    import torch

    from megatron.engine.build import local_device
    from megatron.evaluation.forward import open_forward
    from megatron.parallel.mesh import Mesh

    checkpoint, mesh = _checkpoint(run), Mesh.single()
    init_process_group(env, run.parallel.distributed_backend)
    if env.world_size > 1:
        mesh = Mesh.create(run.parallel.pipe_stages, run.parallel.tensor_ranks, env.world_size, env.rank)
    device = local_device(env.local_rank)
    dtype = torch.float32 if device.type == "cpu" else None  # half precision is slower on CPUs and changes scores
    backend = run.training.kernel_backend
    forward, manifest = open_forward(checkpoint, mesh, dtype=dtype, device=device, backend=backend)
    if not forward.leads:
        forward.follow()
        return
    try:
        _evaluate(run, names, forward, _tokenizer(run, checkpoint, manifest), checkpoint)
    finally:
        forward.stop()


def _options(run: RunConfig, model: ModelConfig) -> HarnessOptions:
    """Options of the model."""
    from megatron.evaluation.options import HarnessOptions, Prefix

    options, mode = run.evaluation, run.generation.prompt_mode
    prefix = Prefix(model.layer_options.get("jrt", {}).get("prefix_length", 0), mode, options.eval_prefix_scope)
    length = options.eval_max_length or run.model.seq_length
    return HarnessOptions(length, options.eval_batch_size, 256, prefix, options.eval_stop_at_eod, run.training.seed)


def _request(run: RunConfig, names: Sequence[str], tokenizer: Tokenizer) -> Request:
    """The tasks to evaluate."""
    from megatron.evaluation.options import Request
    from megatron.evaluation.tasks.shorten import Tokens

    options = run.evaluation
    settings = {
        "context_length": options.eval_context_length,
        "tokenizer": Tokens(tokenizer.tokenize_piece, tokenizer.detokenize),
    }
    folder = Path(options.eval_data_dir).absolute() if options.eval_data_dir else None
    return Request(tuple(names), options.eval_limit, options.eval_num_fewshot, folder, settings)


def _evaluate(run: RunConfig, names: Sequence[str], forward: Forward, tokenizer: Tokenizer, checkpoint: Path) -> None:
    try:
        from megatron.evaluation.lm_eval_model import HarnessLM
        from megatron.evaluation.run_lm_eval import measure, score_lines, summary
    except ImportError as error:
        raise ConfigError(
            "lm-eval is not installed", why=str(error), hint="pip install -r requirements/requirements-eval.txt"
        ) from error
    from megatron.files import write_json

    options, request = _options(run, forward.config), _request(run, names, tokenizer)
    results = measure(HarnessLM(forward, tokenizer, options), request)
    if results is None:  # not the first replica
        return
    print("\n".join(score_lines(results)), flush=True)
    facts: dict[str, Any] = {
        "task": "lm-eval",
        "model": run.name,
        "checkpoint": str(checkpoint),
        "mesh": forward.mesh.describe(),
    }
    facts |= {"limit": request.limit, "max_length": options.max_length, "context_length": run.evaluation.eval_context_length}
    facts |= {"prompt_mode": options.prefix.mode, "prefix_scope": options.prefix.scope, "stop_at_eod": options.stop_at_eod}
    stem = _stem(run, "lm-eval")
    write_json(f"{stem}.json", summary(results, facts))
    print(f"wrote {stem}.json")


def _own_words() -> dict[str, Callable[[RunConfig, Sequence[str]], None]]:
    """Evaluation words that are not tasks of lm-eval -> what measures all words of its kind at once."""
    from megatron.evaluation.options import NEEDLES

    return {
        "perplexity": lambda run, _: perplexity(run),
        "synthetic": lambda run, _: synthetic(run),
        "perplexity_by_length": lambda run, _: perplexity_by_length(run),
        **dict.fromkeys(NEEDLES, needles),
    }


def _task_names(run: RunConfig) -> list[str]:
    """Task names of the configuration, possibly comma-separated; refuses likely typos at once."""
    from megatron.evaluation.options import GROUPS

    names = [name for word in run.evaluation.eval_tasks or () for name in word.split(",") if name]
    known = [*_own_words(), *GROUPS]
    if not names:
        raise ConfigError("there is no evaluation task", hint=f"--eval_tasks {' '.join(known)}, or tasks of lm-eval")
    for name in names:
        if name not in known and (matches := difflib.get_close_matches(name, known, 1, 0.8)):
            raise ConfigError(f"unknown evaluation task '{name}'", hint=f"--eval_tasks {matches[0]}")
    return names


def main(argv: list[str]) -> None:
    """The command."""
    parser = make_parser("Evaluate a trained model.")
    parser.add_argument(
        "--eval_lengths", "--eval-lengths", "--lengths", nargs="+", metavar="N", help="tokens per pass, document or prompt"
    )
    parser.add_argument("--eval_depths", "--eval-depths", "--depths", nargs="+", metavar="D", help="of the needle, 0 to 1")
    parser.add_argument("--eval_text", "--eval-text", metavar="FILE", help="text instead of the data split, for long contexts")
    parser.add_argument("--eval_stride", "--eval-stride", metavar="N", help="tokens scored per pass (sliding window)")
    parser.add_argument("--data-dir", "--eval_data_dir", metavar="DIR", help="local datasets under their Hub names (lm-eval)")
    parser.add_argument("--limit", "--eval_limit", metavar="N", help="examples per task (lm-eval), tokens (perplexity)")
    arguments = parser.parse_intermixed_args(argv)
    for key, words in (("lengths", arguments.eval_lengths), ("depths", arguments.eval_depths)):
        if words:
            arguments.overrides.append(f"eval_{key}=[{', '.join(','.join(words).split(','))}]")
    for key, value in (
        ("stride", arguments.eval_stride), ("data_dir", arguments.data_dir), ("limit", arguments.limit),
        ("text", arguments.eval_text),
    ):  # fmt: skip
        if value:
            arguments.overrides.append(f"eval_{key}={value}")
    env = read_rank_environment()
    run = config_from_args(arguments, check=False)
    names = _task_names(run)
    words = _own_words()
    if env.is_main:
        for measure in dict.fromkeys(words[name] for name in names if name in words):
            measure(run, [name for name in names if words.get(name) is measure])
    if others := [name for name in names if name not in words]:
        try:
            harness(run, others, env)
        finally:
            close_process_group()


if __name__ == "__main__":
    with leaving(), exit_on_error():
        main(sys.argv[1:])
