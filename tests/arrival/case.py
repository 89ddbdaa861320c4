"""One YAML and what the commands make of it: a run that has everything but its steps, a job that is not started, a writer.

The commands themselves run (`train.py`, `deepy.py`, `generate.py`, `eval.py`) up to the call that would do the work; what they
hand to it is recorded.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepy
import eval as eval_command
import generate as generate_command
import train as train_command
from megatron import assemble, data_pipeline, settings
from megatron.checkpoint.load import LoadOptions
from megatron.checkpoint.resume import Resumed
from megatron.checkpoint.save import SaveOptions
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.data.indexed import IndexedWriter, dtype_for_vocab
from megatron.engine.single_process import SingleProcessEngine
from megatron.launch.options import Machine
from megatron.model.block import Block
from megatron.training.state import TrainState

BASE: dict[str, Any] = {
    "data_path": "corpus",
    "tokenizer_type": "CharLevelTokenizer",
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 24,
    "attention_config": [[["metala"], "all"]],
    "num_workers": 0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "weight_decay": 0.1,
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 10,
    "eval_interval": 5,
    "eval_iters": 1,
    "hang_timeout": 0,
    "run_dir": "run",
}
MACHINE = Machine(devices=("0", "1", "2", "3"), cores=8, python="python")


def make_ground(folder: Path) -> None:
    """The corpora, labels, text and host file that the YAMLs of the tables name, in `folder`."""
    for name, documents in (("corpus", 60), ("second", 20), ("third", 30)):
        with IndexedWriter(str(folder / name), dtype_for_vocab(512)) as writer:
            for i in range(documents):
                writer.add_document([*f"{name} {i} ".encode() * (1 + i % 5), 0])
    for name in ("second", "third"):
        with IndexedWriter(str(folder / f"{name}_labels"), dtype_for_vocab(512)) as writer:
            for i in range(20 if name == "second" else 30):
                writer.add_document([7] * (len(f"{name} {i} ".encode() * (1 + i % 5)) + 1))
    rows = "".join(json.dumps({"text": f"plain {i}", "body": f"in the body {i}"}) + "\n" for i in range(200))
    for name in ("text", "more"):
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    (folder / "hosts").write_text("alpha slots=2\nbeta slots=2\ngamma slots=2\n", encoding="utf-8")


def options_in(arguments: Iterable[Any]) -> dict[str, Any]:
    """The fields of the options of checkpoints among the arguments of a call."""
    fields: dict[str, Any] = {}
    for value in arguments:
        if isinstance(value, (SaveOptions, LoadOptions)):
            fields |= vars(value)
    return fields


@dataclass
class Calls:
    """Arguments by name of the calls that were watched, the last one of each function."""

    of: dict[str, dict[str, Any]] = field(default_factory=dict)

    def watch(self, name: str, function: Callable[..., Any], answer: Callable[[], Any] | None = None) -> Callable[..., Any]:
        """`function`, or `answer` in its place; records its arguments under `name`."""
        signature = inspect.signature(function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            flat = dict(bound.arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    flat |= flat.pop(parameter.name)
            self.of[name] = flat | options_in(bound.arguments.values())
            return function(*args, **kwargs) if answer is None else answer()

        return watched


class Ended(Exception):
    """A command has reached the call that ends it."""


def _end() -> Any:
    raise Ended


class Case:
    """One configuration file, written to `path`; everything else is built on first use."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.path, self.calls = path, Calls()
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")

    @functools.cached_property
    def run(self) -> RunConfig:
        """As one process reads it."""
        return load_config([self.path], world_size=1)

    @functools.cached_property
    def fit(self) -> dict[str, Any]:
        """What `train.py` hands to the loop, the last thing before the first step."""
        watch, reach = self.calls.watch, mock.patch.object
        done = SimpleNamespace(exit_code=0)
        with ExitStack() as stack:
            for patch in (
                reach(assemble, "fit", watch("fit", assemble.fit, lambda: done)),
                reach(assemble, "resume", watch("resume", assemble.resume, lambda: Resumed(None, {}))),
                reach(assemble, "init_process_group", watch("connect", assemble.init_process_group)),
                reach(assemble, "build_engine", watch("engine", assemble.build_engine)),
                reach(assemble, "create_run_folder", watch("folder", assemble.create_run_folder)),
                reach(assemble, "copy_console", mock.MagicMock()),
                reach(assemble.Watchdog, "open", watch("watchdog", assemble.Watchdog.open, mock.MagicMock)),
                reach(assemble.Sinks, "open", watch("sinks", assemble.Sinks.open, lambda: mock.MagicMock())),
                reach(settings, "build_tokenizer", watch("tokenizer", settings.build_tokenizer)),
                reach(data_pipeline, "datasets_from_split", watch("split", data_pipeline.datasets_from_split)),
                reach(data_pipeline, "dataset_from_list", self._by_name("list", data_pipeline.dataset_from_list, "name")),
                reach(data_pipeline, "open_stream_dataset", watch("stream", data_pipeline.open_stream_dataset)),
                reach(data_pipeline, "MicroBatchLoader", watch("batches", data_pipeline.MicroBatchLoader)),
            ):
                stack.enter_context(patch)
            train_command.main([str(self.path)])
        return self.calls.of["fit"]

    def _by_name(self, name: str, function: Callable[..., Any], argument: str) -> Callable[..., Any]:
        """Calls are recorded by the value of one argument: `list.train`, `list.valid`."""
        position = list(inspect.signature(function).parameters).index(argument)
        return lambda *args, **kw: self.calls.watch(f"{name}.{args[position]}", function)(*args, **kw)

    def call(self, name: str) -> dict[str, Any]:
        """Arguments of one of the watched calls of a start."""
        assert self.fit
        return self.calls.of[name]

    @property
    def engine(self) -> SingleProcessEngine:
        """The engine of one process."""
        assert isinstance(self.fit["engine"], SingleProcessEngine)
        return self.fit["engine"]

    @property
    def block(self) -> Block:
        """The first block."""
        body = self.engine.local.stages[1].body
        assert isinstance(body, Block)
        return body

    def weight(self, name: str) -> Any:
        """A parameter by its logical name."""
        return self.engine.parameters()[name].detach()

    @functools.cached_property
    def batch(self) -> Any:
        """The first micro batch of the validation."""
        return next(iter(self.fit["actions"].validate.open_batches()))

    @functools.cached_property
    def save(self) -> dict[str, Any]:
        """What a save is given."""
        with mock.patch.object(assemble.Saver, "save", autospec=True) as saved:
            self.fit["actions"].save(TrainState())
        arguments, keywords = saved.call_args
        return {"folder": arguments[1], **keywords, **options_in([*arguments, *keywords.values()])}

    @functools.cached_property
    def rewind(self) -> dict[str, Any]:
        """What going back is given."""
        with mock.patch.object(assemble, "resume") as gone:
            self.fit["actions"].rewind()
        arguments, keywords = gone.call_args
        return {"folder": arguments[0], **keywords, **options_in([*arguments, *keywords.values()])}

    @functools.cached_property
    def mesh(self) -> dict[str, Any]:
        """Sizes of the mesh that `train.py` makes on two ranks; nothing is connected."""
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        create = self.calls.watch("mesh", assemble.Mesh.create, _end)
        with (
            mock.patch.dict("os.environ", env),
            mock.patch.object(assemble, "init_process_group"),
            mock.patch.object(assemble, "copy_console", mock.MagicMock()),
            mock.patch.object(assemble.Mesh, "create", create),
        ):
            self._until_end(lambda: train_command.main([str(self.path)]))
        return self.calls.of["mesh"]

    @functools.cached_property
    def plan(self) -> RunConfig:
        """The configuration that `train.py --dry-run` plans with."""
        planned = self.calls.watch("plan", assemble.dry_run, _end)
        with mock.patch.object(assemble, "dry_run", planned):
            self._until_end(lambda: train_command.main([str(self.path), "--dry-run"]))
        return self.calls.of["plan"]["run"]

    @functools.cached_property
    def limits(self) -> dict[str, Any]:
        """What the dry run judges by."""
        with mock.patch.object(assemble, "limits", self.calls.watch("limits", assemble.limits, _end)):
            self._until_end(lambda: assemble.dry_run(self.run))
        return self.calls.of["limits"]

    @functools.cached_property
    def job(self) -> Any:
        """The job that `deepy.py` would start; hosts are not really asked for their address (`calls.of["reach"]`)."""
        jobs: list[Any] = []

        def reach(names: Any) -> dict[str, str]:
            self.calls.of["reach"] = {"names": list(names)}
            return dict.fromkeys(names, "10.0.0.1")

        def keep(job: Any) -> tuple[int, str]:
            jobs.append(job)
            return 0, ""

        with (
            mock.patch.object(deepy, "run_job", keep),
            mock.patch.object(deepy, "addresses", reach),
            mock.patch.object(deepy, "this_machine", return_value=MACHINE),
            mock.patch.dict("os.environ", {"NCCL_DEBUG": "INFO", "MY_SETTING": "seen"}),
        ):
            assert deepy.main([str(Path(deepy.__file__).with_name("train.py")), str(self.path)]) == 0
        return jobs[0]

    @functools.cached_property
    def writer(self) -> Any:
        """What `generate.py` writes with; its model and tokenizer stand for any."""
        model = SimpleNamespace(
            config=SimpleNamespace(layer_options={"jrt": {"prefix_length": 8}}), parameters=list, eval=lambda: model
        )
        manifest = SimpleNamespace(facts={})
        with (
            mock.patch("megatron.checkpoint.find.find_checkpoint", self.calls.watch("find", lambda load, iteration: Path("x"))),
            mock.patch("megatron.generation.load.load_model", return_value=(model, manifest)),
            mock.patch("torch.cuda.is_available", return_value=False),
        ):
            return generate_command._writer(self._lenient())

    @functools.cached_property
    def text(self) -> dict[str, Any]:
        """What `generate.py` does with its writer: the kind of text, and with what."""
        done: dict[str, Any] = {}
        writer = SimpleNamespace(continue_texts=lambda prompts: ("file", prompts))
        names = "megatron.generation.text."
        with (
            mock.patch.object(generate_command, "_writer", return_value=writer),
            mock.patch(f"{names}interactive", lambda w, i, o, end: done.update(kind="interactive", end=end)),
            mock.patch(f"{names}unconditional", lambda w, count: ("unconditional", count)),
            mock.patch(f"{names}read_prompts", lambda source, end: done.update(source=str(source), end=end) or ["a"]),
            mock.patch(
                f"{names}write_results",
                lambda results, output: done.update(kind=results[0], given=results[1], output=str(output)),
            ),
        ):
            generate_command.generate(self._lenient())
        return done

    @functools.cached_property
    def measured(self) -> Any:
        """(options, request) of `eval.py` for lm-eval."""
        run, model = self._lenient(), SimpleNamespace(layer_options={"jrt": {"prefix_length": 8}})
        tokenizer = SimpleNamespace(tokenize_piece=len, detokenize=str)
        options = eval_command._options(run, model)  # type: ignore[arg-type]
        return options, eval_command._request(run, eval_command._task_names(run), tokenizer)  # type: ignore[arg-type]

    @functools.cached_property
    def perplexity(self) -> dict[str, Any]:
        """What `eval.py` scores: every call's length and stride, the tokens, and where results go."""
        scored: list[tuple[int, int, str]] = []
        results: dict[str, Any] = {"scored": scored}

        def score(model: Any, tokens: Any, eod: int, length: int, stride: int, backend: str, vocab_size: int) -> Any:
            results["tokens"] = len(tokens)
            scored.append((length, stride, backend))
            raise ValueError("only recorded")

        tokenizer = settings.tokenizer_of(self.run)
        with (
            mock.patch.object(eval_command, "_opened", return_value=(None, tokenizer, Path("x"))),
            mock.patch("megatron.evaluation.perplexity.score", score),
            mock.patch("megatron.evaluation.report.table", return_value="\n\n"),
            mock.patch("megatron.evaluation.report.plot_lengths"),
            mock.patch("megatron.files.write_json", lambda path, value: results.update(output=path)),
        ):
            eval_command.perplexity(self._lenient())
        return results

    @functools.cached_property
    def needles(self) -> dict[str, Any]:
        """What `eval.py` measures with needles: the plan, and the file that the haystack is read from."""
        results: dict[str, Any] = {}

        def measure(*values: Any, **options: Any) -> dict[str, Any]:
            results.update(plan=values[3], text=values[4].args[0])
            return {"rows": []}

        with (
            mock.patch.object(eval_command, "_opened", return_value=(None, settings.tokenizer_of(self.run), Path("x"))),
            mock.patch.object(eval_command, "_store"),
            mock.patch("megatron.evaluation.long_context.measure_needles", measure),
        ):
            eval_command.needles(self._lenient(), ["niah"])
        return results

    def _lenient(self) -> RunConfig:
        """As the commands read it that only need a checkpoint."""
        return load_config([self.path], check=False)

    @staticmethod
    def _until_end(command: Callable[[], Any]) -> None:
        try:
            command()
        except Ended:
            return
        raise AssertionError("the command did not reach the call that ends it")
