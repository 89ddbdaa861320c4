"""lm-eval scores of one tiny trained model: in this process, over tensor and pipeline ranks and replicas, and stock `hf`.

All in fp64, where what differs is the algorithm and not the rounding: log-likelihoods agree to 1e-9 (in fp32 sums over ranks
and in another order differ by up to 1e-6 of them).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.api.model import LM

from megatron.data.tokenizers import build_tokenizer
from megatron.errors import ConfigError, DataError
from megatron.evaluation.forward import open_forward
from megatron.evaluation.lm_eval_model import HarnessLM
from megatron.evaluation.options import RECALL, HarnessOptions, Prefix, Request
from megatron.evaluation.run_lm_eval import OWN_TASKS, counts_of, load_tasks, measure, score_lines, summary, task_manager
from megatron.evaluation.tasks.shorten import Tokens
from megatron.export.hf import export_checkpoint
from megatron.parallel.mesh import Mesh
from tests.evaluation.tiny import LENGTH, tiny_config, trained_checkpoint, write_recall, write_standard
from tests.export.modules_cache import use_private_modules_cache
from tests.parallel.ranks import run_ranks

TASKS = ("piqa", "wikitext", "lambada_openai", "squad_completion", "swde", "fda", "based_swde_twice")
ON_RANKS = ("piqa", "wikitext", "swde", "based_swde_twice")  # one of each kind of request
Samples = dict[str, list[tuple[int, Any]]]
BYTES = build_tokenizer("CharLevelTokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Datasets, a checkpoint of two MetaLA layers (`metala`) and its exported folder (`hf`)."""
    root = tmp_path_factory.mktemp("lm-eval")
    write_recall(write_standard(root / "data"))
    use_private_modules_cache()
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, root / "cache"
    checkpoint = trained_checkpoint(root / "metala", tiny_config("metala", "metala"))
    export_checkpoint(checkpoint, root / "hf")
    yield root
    datasets.config.HF_DATASETS_CACHE = before


def request(root: Path, *tasks: str, **changes: Any) -> Request:
    metadata = {"context_length": 150, "tokenizer": Tokens(BYTES.tokenize, BYTES.detokenize)}
    given = {"data_dir": root / "data", "metadata": metadata, "bootstrap_iters": 0} | changes
    return Request(tasks or TASKS, **given)


def checkpoint_lm(checkpoint: Path, mesh: Mesh, prefix: Prefix | None = None, batch: int = 3) -> HarnessLM:
    forward, _ = open_forward(checkpoint, mesh, dtype=torch.float64)
    return HarnessLM(forward, BYTES, HarnessOptions(LENGTH, batch, prefix=prefix or Prefix()))


def stock_lm(folder: Path, batch: int) -> LM:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float64", batch_size=batch)


def samples(found: Mapping[str, Any]) -> Samples:
    """Task -> (document, what the model answered), in the order of documents."""
    return {
        name: sorted(((row["doc_id"], [r[0] for r in row["resps"]]) for row in rows), key=lambda pair: pair[0])
        for name, rows in found["samples"].items()
    }


def assert_equal(one: Samples, other: Samples) -> None:
    assert one.keys() == other.keys()
    for name, rows in one.items():
        assert [n for n, _ in rows] == [n for n, _ in other[name]], name
        for (_, first), (_, second) in zip(rows, other[name], strict=True):
            for a, b in zip(first, second, strict=True):
                if isinstance(a, str):
                    assert a == b, name
                else:
                    value, greedy = a if isinstance(a, (tuple, list)) else (a, True)
                    wanted, also = b if isinstance(b, (tuple, list)) else (b, True)
                    assert value == pytest.approx(wanted, abs=1e-9) and greedy == also, name


def scores(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{name}/{key}": value
        for name, values in found["results"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The results of one process."""
    found = measure(checkpoint_lm(next((folder / "metala").glob("global_step*")), Mesh.single()), request(folder))
    assert found is not None
    return found


def on_ranks(root: str) -> list[tuple[Samples, dict[str, float]] | None]:
    """The same over two tensor ranks, two pipeline ranks and two replicas, one after the other."""
    datasets.config.HF_DATASETS_CACHE = Path(root) / "cache"
    rank, found = int(os.environ["RANK"]), []
    for pp, tp in ((1, 2), (2, 1), (1, 1)):
        lm = checkpoint_lm(next((Path(root) / "metala").glob("global_step*")), Mesh.create(pp, tp, 2, rank))
        held = sum(p.numel() for p in lm.forward.model.parameters() if not p.is_meta)
        assert pp * tp == 1 or held < 0.8 * sum(p.numel() for p in lm.forward.model.parameters()) * tp
        if not lm.forward.leads:
            lm.forward.follow()
            found.append(None)
            continue
        try:
            results = measure(lm, request(Path(root), *ON_RANKS))
        finally:
            lm.forward.stop()
        found.append(None if results is None else (samples(results), scores(results)))
    return found


@pytest.mark.slow
def test_over_ranks(folder: Path, alone: dict[str, Any]) -> None:
    first, second = run_ranks(on_ranks, 2, str(folder), timeout=120)
    assert second == [None, None, None]
    for found in first:
        assert found is not None
        assert_equal({name: rows for name, rows in samples(alone).items() if name in ON_RANKS}, found[0])
        wanted = {key: value for key, value in scores(alone).items() if key.split("/")[0] in ON_RANKS}
        assert found[1] == pytest.approx(wanted, rel=1e-9) and len(wanted) == 7


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_stock_hf_on_the_exported_folder(folder: Path, alone: dict[str, Any], batch: int) -> None:
    found = measure(stock_lm(folder / "hf", batch), request(folder))
    assert found is not None
    assert_equal(samples(alone), samples(found))
    assert scores(found) == pytest.approx(scores(alone), rel=1e-9)
    assert len(scores(alone)) == 11 and any(text for _, (text,) in samples(alone)["swde"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("official", "ours"), [("swde", "swde_stripped"), ("fda", "fda_stripped"), ("squad_completion", "squad_stripped")]
)
def test_official_tasks_equal_ours(folder: Path, official: str, ours: str) -> None:
    lm = checkpoint_lm(next((folder / "metala").glob("global_step*")), Mesh.single())
    raw = ours.replace("stripped", "verbatim")
    found = measure(lm, request(folder, official, ours, raw))
    assert found is not None
    kept = found["samples"]
    for theirs, mine, before in zip(kept[official], kept[ours], kept[raw], strict=True):
        (prompt, asked), (same, said) = theirs["arguments"][0], mine["arguments"][0]
        assert prompt == same and all(asked[key] == said[key] for key in ("until", "max_gen_toks"))
        assert theirs["contains"] == mine["contains"] and theirs["resps"] == mine["resps"]
        assert theirs["target"] == mine["target"][0]
        assert before["arguments"][0][0].strip() == prompt and before["target"][0].strip() == theirs["target"]
    assert any(a["arguments"][0][0] != b["arguments"][0][0] for a, b in zip(kept[ours], kept[raw], strict=True))
    results = found["results"]
    assert results[official]["contains,none"] == results[ours]["contains,none"]


@pytest.mark.slow
def test_jrt_equals_stock_when_the_prefix_is_the_whole(folder: Path) -> None:
    """Stock `hf` lets prefix layers read the scored text; our default does not, and generation is the same in both."""
    config = tiny_config("base_conv", "jrt", layer_options={"jrt": {"prefix_length": 64}})
    checkpoint = trained_checkpoint(folder / "jrt", config, steps=15)
    export_checkpoint(checkpoint, folder / "hf-jrt")
    asked = request(folder, "piqa", "swde")
    stock = measure(stock_lm(folder / "hf-jrt", 1), asked)
    whole = measure(checkpoint_lm(checkpoint, Mesh.single(), Prefix(64, scope="whole")), asked)
    context = measure(checkpoint_lm(checkpoint, Mesh.single(), Prefix(64)), asked)
    assert stock is not None and whole is not None and context is not None
    assert_equal(samples(stock), samples(whole))
    assert samples(context)["swde"] == samples(stock)["swde"]
    ours, theirs = samples(context)["piqa"][0][1], samples(stock)["piqa"][0][1]
    assert abs(ours[0][0] - theirs[0][0]) > 1e-3


@pytest.mark.slow
def test_what_is_left_out_is_reported(folder: Path, alone: dict[str, Any]) -> None:
    counts = alone["recall"]["based_swde_twice"]
    assert counts == {"records": 4, "dropped": 1, "anchor_missing": 0, "shortened": counts["shortened"]}
    assert alone["n-samples"]["based_swde_twice"]["effective"] == 3
    assert any(line.startswith("based_swde_twice: 4 records, 1 dropped") for line in score_lines(alone))
    kept = summary(alone, {"model": "tiny"})
    assert json.loads(json.dumps(kept))["recall"]["based_swde_twice"] == counts and "samples" not in kept
    assert kept["versions"]["swde"] == 1


@pytest.mark.slow
def test_every_recall_task_loads_from_local_data(folder: Path) -> None:
    names = sorted(file.stem for file in OWN_TASKS.glob("*.yaml") if not file.stem.startswith("contains"))
    assert len(names) == 22 and set(RECALL) | {f"{name}_twice" for name in RECALL} <= set(names)
    tasks = load_tasks(request(folder, *names))["tasks"]
    assert list(tasks) == names
    for name, task in tasks.items():
        docs = list(task.validation_docs())
        assert 1 <= len(docs) <= 4 and all(doc["prompt"] and doc["answers"] for doc in docs), name
        prompt, metrics = docs[0]["prompt"], set(task.aggregation())
        assert metrics == ({"contains", "exact", "f1"} if name.startswith(("based_squad", "based_tri")) else {"contains"})
        if name.endswith("_twice"):
            assert prompt.count("the cat sat on the mat") == 2 and "\n" in prompt, name
        elif name.startswith("based_") and "squad" not in name:
            assert prompt.endswith((" Name:", "the cat sat on the")) and prompt.count("the cat sat on the mat") == 1, name
    assert counts_of(tasks["based_fda"])["dropped"] == 1 and counts_of(tasks["based_drop"])["dropped"] == 0


@pytest.mark.slow
def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import eval as command

    values = {
        "tokenizer_type": "CharLevelTokenizer",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": LENGTH,
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": 1,
        "load": str(folder / "metala"),
        "run_dir": str(folder / "run"),
        "eval_context_length": 150,
    }
    (folder / "tiny.yml").write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.chdir(folder)
    shots = ["--set", "eval_num_fewshot=1"]
    command.main(
        ["tiny.yml", "--eval_tasks", "piqa,based_swde", "lambada_openai", "--data-dir", "data", "--limit", "2", *shots]
    )
    written = json.loads(next((folder / "run").glob("eval_lm-eval_*.json")).read_text())
    assert set(written["results"]) == {"piqa", "based_swde", "lambada_openai"} and written["limit"] == 2
    assert (written["n-shot"]["piqa"], written["n-shot"]["based_swde"]) == (1, 0)
    assert written["n-samples"]["piqa"]["effective"] == 2 and written["lm_eval"] == "0.4.13"
    assert "based_swde: 4 records, 1 dropped" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="this model has none"):
        command.main(["tiny.yml", "--eval_tasks", "piqa", "--data-dir", "data", "--set", "prompt_mode=left_pad"])


@pytest.mark.slow
def test_mistakes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown evaluation task 'piqqa'") as caught:
        task_manager(["piqa", "piqqa"])
    assert caught.value.hint == "near: piqa"
    lm = checkpoint_lm(next((folder / "metala").glob("global_step*")), Mesh.single())
    with pytest.raises(DataError, match="task 'winogrande' cannot be read"):
        measure(lm, request(folder, "winogrande"))
    with pytest.raises(DataError, match="local datasets"):
        measure(lm, request(folder, "piqa", data_dir=folder / "nothing"))


def test_a_checkpoint_needs_a_layer_per_stage(tmp_path: Path) -> None:
    checkpoint = trained_checkpoint(tmp_path / "one", tiny_config("metala"), steps=0)
    with pytest.raises(ConfigError, match="cannot fill 2 pipeline stages"):
        open_forward(checkpoint, Mesh.shape_only(2, 1, 2, 0))
    forward, _ = open_forward(checkpoint, Mesh.shape_only(1, 2, 2, 1), dtype=torch.float64)
    assert forward.model.lm_head.weight.shape == (260, 32) and forward.model.lm_head.weight.dtype == torch.float64
