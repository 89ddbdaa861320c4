"""`verify` and resume judge alike: each damage of the newest checkpoint is named by both, and the older whole one is used."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.layout import LATEST, MANIFEST
from megatron.checkpoint.load import damages
from megatron.checkpoint.manifest import _digest
from megatron.checkpoint.resume import resume
from megatron.checkpoint.save import save_checkpoint
from tests.checkpoint.fakes import MODEL, FakeEngine
from tools import checkpoint as tool

LAYER, OPTIM, RNG = "layer_02-model_00.safetensors", "optim-dp0-pp0-tp0.safetensors", "rng-rank0.safetensors"
Q, EMBED = "model.layers.0.token_mixer.q_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save folder with the steps 7 and 9."""
    folder = tmp_path_factory.mktemp("good")
    for step in (7, 9):
        save_checkpoint(folder, FakeEngine(seed=step), {"iteration": step}, model_config=MODEL, config_texts={"a.yml": "x: 1"})
    return folder


@pytest.fixture
def two(good: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(good, tmp_path / "two")


def signed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it a right checksum."""
    body = json.loads((path / MANIFEST).read_text())
    change(body)
    (path / MANIFEST).write_text(json.dumps({**body, "sha256": _digest(body)}))


def set_at(*keys: Any, to: Any) -> Callable[[Path], None]:
    """A signed manifest with another value at a place."""

    def work(path: Path) -> None:
        def change(body: Any) -> None:
            for key in keys[:-1]:
                body = body[key]
            body[keys[-1]] = copy.deepcopy(to)

        signed(path, change)

    return work


def twice(*keys: Any) -> Callable[[Path], None]:
    """A signed manifest with the first item of a list once more."""

    def work(path: Path) -> None:
        def change(body: Any) -> None:
            for key in keys:
                body = body[key]
            body.append(dict(body[0]))

        signed(path, change)

    return work


def halves_on_each_other(path: Path) -> None:
    """Two ranges that add up to the right number of elements and leave a hole."""

    def change(body: Any) -> None:
        part = body["optimizer"][EMBED][0]
        body["optimizer"][EMBED] = [{**part, "range_stop": 64}, {**part, "range_stop": 64}]

    signed(path, change)


def without(*keys: Any) -> Callable[[Path], None]:
    """A signed manifest that lacks something."""

    def work(path: Path) -> None:
        def change(body: Any) -> None:
            for key in keys[:-1]:
                body = body[key]
            del body[keys[-1]]

        signed(path, change)

    return work


def resealed(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of a safetensors file (same length), with the hashes of the manifest made right."""

    def work(path: Path) -> None:
        import hashlib

        data = (path / file).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + size])
        change(table)
        text = json.dumps(table, separators=(",", ":")).encode()
        assert len(text) <= size
        data = data[:8] + text.ljust(size) + data[8 + size :]
        (path / file).write_bytes(data)

        def reseal(body: Any) -> None:
            body["files"][file]["blocks"][0][1] = hashlib.sha256(data[: 8 + size]).hexdigest()

        signed(path, reseal)

    return work


def renamed(table: dict[str, Any]) -> None:
    table["r" + Q[1:]] = table.pop(Q)


def instead(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else under a file's name."""

    def work(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return work


def loop(path: Path) -> None:
    """A link to itself."""
    path.symlink_to(path.name)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deep": lambda path: (path / MANIFEST).write_text("[" * 100_000 + "]" * 100_000) and None,
    "deep but parsed": set_at("facts", to=json.loads('{"a":' * 70 + "1" + "}" * 70)),
    "number of 5,000 digits": lambda path: (path / MANIFEST).write_text('{"iteration": ' + "9" * 5000 + "}") and None,
    "not UTF-8": lambda path: (path / MANIFEST).write_bytes(b'{"format": "\xff"}') and None,
    "half a surrogate": set_at("save_id", to="\ud800"),
    "mesh null": set_at("mesh", to=None),
    "mesh without tp": set_at("mesh", to={"pp": 1, "dp": 1}),
    "mesh of texts": set_at("mesh", "dp", to="1"),
    "state a list": set_at("state", to=[]),
    "iteration of the state a text": set_at("state", "iteration", to="nine"),
    "samples negative": set_at("state", "consumed_samples", to=-1),
    "loss scale a text": set_at("engine", to={"loss_scale": {"value": "big"}}),
    "version a list": set_at("version", to=[2]),
    "weights a list": set_at("weights", to=[]),
    "no weights": set_at("weights", to={}),
    "a weight is missing": without("weights", Q),
    "dtype unknown": set_at("weights", Q, "dtype", to="nothing"),
    "dtype another": set_at("weights", Q, "dtype", to="float16"),
    "shape negative": set_at("weights", Q, "shape", to=[-8, -8]),
    "shape another": set_at("weights", Q, "shape", to=[4, 16]),
    "shape huge": set_at("weights", Q, "shape", to=[1 << 40, 1 << 40]),
    "parts missing": set_at("weights", Q, "parts", to=[]),
    "part half": set_at("weights", EMBED, "parts", 0, "stop", to=8),
    "part of no such dimension": set_at("weights", Q, "parts", 0, "dim", to=7),
    "optimizer of one missing": without("optimizer", Q),
    "optimizer part twice": twice("optimizer", Q),
    "optimizer halves on each other": halves_on_each_other,
    "optimizer range negative": set_at("optimizer", Q, 0, "range_start", to=-4),
    "moments another": set_at("optimizer", Q, 0, "moments", to=["exp_avg", "other"]),
    "step a text": set_at("optimizer", Q, 0, "step", to="1"),
    "file of a part unknown": set_at("weights", Q, "parts", 0, "file", to="layer_99-model_00.safetensors"),
    "size a text": set_at("files", LAYER, "size", to="12"),
    "blocks null": set_at("files", LAYER, "blocks", to=None),
    "manifest a pipe": instead(MANIFEST, os.mkfifo),
    "manifest a link to itself": instead(MANIFEST, loop),
    "manifest a folder": instead(MANIFEST, Path.mkdir),
    "weights a pipe": instead(LAYER, os.mkfifo),
    "weights a link to itself": instead(LAYER, loop),
    "optimizer a folder": instead(OPTIM, Path.mkdir),
    "weights /dev/zero": instead(LAYER, lambda path: path.symlink_to("/dev/zero")),
    "header has another tensor": resealed(LAYER, renamed),
    "header has another dtype": resealed(LAYER, lambda table: table[Q].update(dtype="F16")),
    "header's texts null": resealed(LAYER, lambda table: table.update(__metadata__=[])),
    "random numbers of another kind": resealed(RNG, lambda table: table["torch"].update(dtype="I8")),
    "random numbers missing": resealed(RNG, lambda table: table.update(nump=table.pop("numpy"))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_and_resume_agree(name: str, two: Path) -> None:
    """The newest is named by both; the older one is loaded, whole."""
    newest = two / "global_step9"
    DAMAGES[name](newest)
    found = damages(newest)
    assert found and all(line.strip() for line in found)
    engine = FakeEngine(seed=3)
    resumed = resume(two, engine, model_config=MODEL)
    assert resumed.path == two / "global_step7" and resumed.state["iteration"] == 7
    assert len(resumed.skipped) == 1 and "global_step9" in resumed.skipped[0]
    assert engine.same_as(FakeEngine(seed=7))


def test_the_undamaged_one_is_whole(two: Path) -> None:
    signed(two / "global_step9", lambda body: None)
    assert damages(two / "global_step9") == []
    assert resume(two, FakeEngine(), model_config=MODEL).state == {"iteration": 9}


LATESTS: dict[str, Callable[[Path], Any]] = {
    "300 digits": lambda path: path.write_text("global_step" + "9" * 300),
    "5,000 digits": lambda path: path.write_text("global_step" + "9" * 5000),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to itself": loop,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "empty": lambda path: path.write_text(""),
    "other digits": lambda path: path.write_text("global_step\u0669"),
    "of no checkpoint": lambda path: path.write_text("global_step8"),
}


@pytest.mark.parametrize("name", LATESTS)
def test_a_bad_latest_is_named_and_the_newest_used(
    name: str, two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (two / LATEST).unlink()
    LATESTS[name](two / LATEST)
    found = resume(two, FakeEngine(), model_config=MODEL)
    assert found.path is not None and any("latest" in line for line in found.skipped)
    assert found.path.name == ("global_step7" if name == "of no checkpoint" else "global_step9")
    monkeypatch.setattr("sys.argv", ["checkpoint.py", "verify", str(two)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    said = capsys.readouterr().out
    assert ended.value.code == 4 and f"{two / LATEST}: damaged" in said and said.count(": whole") == 2
