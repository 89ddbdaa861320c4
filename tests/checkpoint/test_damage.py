"""Every kind of damage is named: which file, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import MANIFEST
from megatron.checkpoint.load import LoadOptions, damages, load_checkpoint, read_full_weights, verify_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.errors import CheckpointError
from tests.checkpoint.fakes import MODEL, FakeEngine

FILES = (
    "layer_00-model_00.safetensors",
    "layer_02-model_00.safetensors",
    "optim-dp0-pp0-tp0.safetensors",
    "rng-rank0.safetensors",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint."""
    return save_checkpoint(
        tmp_path, FakeEngine(), {"iteration": 7}, SaveOptions(model_config=MODEL, config_texts={"a.yml": "x: 1"})
    )


def refused(path: Path, *says: str) -> None:
    """Loading fails, the message has all of `says`, and the engine is as it was."""
    engine = FakeEngine(seed=2)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, engine)
    for text in says:
        assert text in str(caught.value)
    assert engine.same_as(FakeEngine(seed=2))


@pytest.mark.parametrize("file", FILES)
def test_truncated(path: Path, file: str) -> None:
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[:-1])
    refused(path, file, "truncated", f"{len(data) - 1} bytes", str(len(data)))
    (path / file).write_bytes(b"")
    refused(path, file, "truncated: 0 bytes")


@pytest.mark.parametrize("file", FILES)
def test_grown(path: Path, file: str) -> None:
    with open(path / file, "ab") as handle:
        handle.write(b"\0")
    refused(path, file, "wrong size")


@pytest.mark.parametrize("file", FILES)
def test_flipped_bit(path: Path, file: str) -> None:
    data = bytearray((path / file).read_bytes())
    data[-5] ^= 4
    (path / file).write_bytes(data)
    refused(path, file, "SHA-256")


@pytest.mark.parametrize("file", FILES)
def test_missing(path: Path, file: str) -> None:
    (path / file).unlink()
    refused(path, file, "missing")


def test_a_shard_of_another_save(path: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", FakeEngine(), {"iteration": 7}, SaveOptions(model_config=MODEL))
    shutil.copy(other / FILES[0], path / FILES[0])
    refused(path, FILES[0])
    body = json.loads((path / MANIFEST).read_text())
    body["files"][FILES[0]] = json.loads((other / MANIFEST).read_text())["files"][FILES[0]]
    _rewrite(path, body)
    refused(path, FILES[0], "another save")


def test_missing_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()
    refused(path, MANIFEST, "missing")
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        find_checkpoint(path.parent)


def test_truncated_manifest(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (path / MANIFEST).write_text(text[:length])
        refused(path, MANIFEST, "not readable as JSON")


def test_the_damaged_tensor_is_named(path: Path) -> None:
    reader_table = load_file(path / FILES[1])
    data = bytearray((path / FILES[1]).read_bytes())
    at = bytes(data).index(reader_table["model.layers.0.token_mixer.o_proj.weight"].view(torch.uint8).numpy().tobytes())
    data[at + 9] ^= 16
    (path / FILES[1]).write_bytes(data)
    refused(path, FILES[1], "'model.layers.0.token_mixer.o_proj.weight'", "SHA-256")
    found = damages(path)
    assert len(found) == 1 and "'model.layers.0.token_mixer.o_proj.weight'" in found[0]
    assert f"bytes {at} to {at + 128}" in found[0]


def test_without_verification_sizes_and_saves_are_compared_still(path: Path) -> None:
    data = bytearray((path / FILES[1]).read_bytes())
    data[-1] ^= 1
    (path / FILES[1]).write_bytes(data)
    load_checkpoint(path, FakeEngine(seed=2), LoadOptions(verify=False))
    (path / FILES[1]).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path, FakeEngine(seed=2), LoadOptions(verify=False))


@pytest.mark.parametrize("change", ["length", "json", "offsets", "dtype", "shape"])
def test_headers_that_lie(path: Path, change: str) -> None:
    """Without hashes the header is all there is to trust: nothing is allocated by its word."""
    file = path / FILES[0]
    data = file.read_bytes()
    edits = {
        "length": (data[:8], struct.pack("<Q", 1 << 60)),
        "json": (b'{"', b"{{"),
        "offsets": (b'"data_offsets":[0,256]', b'"data_offsets":[0,999]'),
        "dtype": (b'"BF16"', b'"BF99"'),
        "shape": (b"[16,8]", b"[99,8]"),
    }
    before, after = edits[change]
    assert before in data
    file.write_bytes(data.replace(before, after, 1))
    with pytest.raises(CheckpointError, match="header"):
        load_checkpoint(path, FakeEngine(seed=2), LoadOptions(verify=False))


def test_version_1_is_read(path: Path) -> None:
    body = json.loads((path / MANIFEST).read_text())
    for name in body["files"]:
        data = (path / name).read_bytes()
        body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _rewrite(path, {**body, "version": 1})
    engine = FakeEngine(seed=2)
    load_checkpoint(path, engine)
    assert engine.same_as(FakeEngine(seed=1))
    data = bytearray((path / FILES[2]).read_bytes())
    data[-1] ^= 1
    (path / FILES[2]).write_bytes(data)
    refused(path, FILES[2], "SHA-256")
    assert FILES[2] in damages(path)[0]


def _rewrite(path: Path, body: dict[str, object]) -> None:
    """Store a manifest whose checksum is right, whatever it says."""
    from megatron.checkpoint.manifest import _digest

    (path / MANIFEST).write_text(json.dumps({**body, "sha256": _digest(body)}))


def test_lying_size_and_hash(path: Path) -> None:
    body = json.loads((path / MANIFEST).read_text())
    honest = json.loads(json.dumps(body["files"][FILES[0]]))
    body["files"][FILES[0]]["size"] += 8
    body["files"][FILES[0]]["blocks"][-1][0] += 8
    (path / MANIFEST).write_text(json.dumps(body))
    refused(path, MANIFEST, "checksum")
    _rewrite(path, body)
    refused(path, FILES[0], "truncated")
    body["files"][FILES[0]] = {**honest, "blocks": [[end, "0" * 64] for end, _ in honest["blocks"]]}
    _rewrite(path, body)
    refused(path, FILES[0], "SHA-256", "0000")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/../../b", ""])
def test_names_that_leave_the_folder(path: Path, name: str) -> None:
    body = json.loads((path / MANIFEST).read_text())
    body["files"][name] = body["files"][FILES[0]]
    _rewrite(path, body)
    refused(path, "not a listed file inside")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", None),
        ("weights", {"a": {}}),
        ("files", [1]),
        ("version", 99),
        ("format", "x"),
        ("optimizer", {"a": [{}]}),
    ],
)
def test_malformed_manifest(path: Path, key: str, value: object) -> None:
    body = json.loads((path / MANIFEST).read_text())
    _rewrite(path, {**body, key: value})
    refused(path, MANIFEST)


def test_manifest_that_is_no_object(path: Path) -> None:
    for text in ("[]", "3", '"x"', "null"):
        (path / MANIFEST).write_text(text)
        refused(path, MANIFEST)


def test_parts_that_leave_a_hole(path: Path) -> None:
    body = json.loads((path / MANIFEST).read_text())
    body["weights"]["model.embed_tokens.weight"]["parts"][0]["stop"] = 9
    _rewrite(path, body)
    refused(path, "model.embed_tokens.weight", "cover 72 of 128")


def test_renamed_folder(path: Path) -> None:
    moved = path.rename(path.with_name("global_step8"))
    refused(moved, "global_step8", "step 7")


def test_full_weights_and_verify_see_damage_too(path: Path) -> None:
    (path / "configs" / "a.yml").write_text("x: 2")
    with pytest.raises(CheckpointError, match="a.yml"):
        verify_checkpoint(path)
    read_full_weights(path)
    (path / FILES[1]).unlink()
    with pytest.raises(CheckpointError, match=FILES[1]):
        read_full_weights(path)


def test_random_damage_is_always_named(path: Path) -> None:
    """100 random damages (a flipped bit, a cut, zeroes, a swap, a deletion) of any file: all are seen; some need `verify`."""
    rng = random.Random(5)
    good = {name: (path / name).read_bytes() for name in [*read_manifest(path).files, MANIFEST]}
    for _ in range(100):
        name = rng.choice(list(good))
        data = bytearray(good[name])
        kind = rng.choice(["flip", "cut", "zero", "delete"])
        at = rng.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            data = data[:at]
        elif kind == "zero":
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        if kind == "delete":
            (path / name).unlink()
        elif bytes(data) != good[name]:
            (path / name).write_bytes(data)
        else:
            continue
        said = ""
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            said = str(error)
        harmless = not said and name == MANIFEST  # a changed blank in the manifest changes nothing that is read
        assert Path(name).name in said or (harmless and json.loads(data) == json.loads(good[name]))
        (path / name).write_bytes(good[name])
    verify_checkpoint(path)
