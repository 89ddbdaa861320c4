"""Texts and images: what is read from which source, splits without a common example, balance, messages for bad folders."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.errors import ConfigError, DataError
from megatron.synthetics.dataset import SPLITS, TASKS, SyntheticDataset, read_slices
from megatron.synthetics.pixels import Pixels
from megatron.synthetics.stored import StoredTask, stored_split
from megatron.synthetics.task import checked
from megatron.synthetics.text_bytes import PACKAGES, TextBytes

X = -100


def examples(task: StoredTask) -> list[tuple[bytes, str]]:
    """Content and class of every example of the task's split, from the arrays that a model reads."""
    made = task.take(np.arange(task.available()))
    classes, out = stored_split(task).classes, []
    for read, labels in zip(made.inputs, made.labels, strict=True):
        end = int(np.flatnonzero(labels != X)[0])
        assert (labels != X).sum() == 1 and read[end] == task.mark and not read[end + 1 :].any()
        out.append((read[:end].astype(np.uint8).tobytes(), classes[labels[end]]))
    return out


def texts(path: Path, count: int = 60) -> list[dict[str, Any]]:
    rows = [{"text": f"{'good' if i % 3 else 'bad'} film number {i} é", "label": int(i % 3 > 0)} for i in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_texts_of_a_file(tmp_path: Path) -> None:
    rows = texts(tmp_path / "t.jsonl")
    parts = {s: examples(TextBytes(source=str(tmp_path / "t.jsonl"), length=20, split=s, test_share=0.3)) for s in SPLITS}
    wanted = sorted((row["text"].encode()[:19], str(row["label"])) for row in rows)
    assert sorted(parts["train"] + parts["valid"] + parts["test"]) == wanted
    assert 8 <= len(parts["test"]) <= 28 and len(parts["train"]) > len(parts["test"]) > len(parts["valid"]) > 0


def test_equal_texts_stand_in_one_split(tmp_path: Path) -> None:
    """Texts that are equal as far as they are read are equal; a further text moves none."""
    path = tmp_path / "t.jsonl"
    rows = [{"text": f"{i % 30:02d} begins, {i}", "label": i % 2} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parts = [{content for content, _ in examples(TextBytes(source=str(path), length=10, split=s))} for s in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 30
    other = tmp_path / "more.jsonl"
    other.write_text(path.read_text() + json.dumps({"text": "a new text", "label": 0}) + "\n", encoding="utf-8")
    for split, part in zip(SPLITS, parts, strict=True):
        assert part <= {content for content, _ in examples(TextBytes(source=str(other), length=10, split=split))}


def test_folders_with_splits(tmp_path: Path) -> None:
    """The layout of IMDb: train and test, a folder per class, one more folder that is left out; valid comes from train."""
    for split, count in (("train", 40), ("test", 9)):
        for name in ("neg", "pos", "unsup"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.txt").write_text(f"{split} {name} {i}")
    parts = {s: examples(TextBytes(source=str(tmp_path), length=64, labels="pos, neg", split=s)) for s in SPLITS}
    assert sorted(parts["test"]) == sorted((f"test {n} {i}".encode(), n) for n in ("neg", "pos") for i in range(9))
    assert sorted(parts["train"] + parts["valid"]) == sorted(
        (f"train {n} {i}".encode(), n) for n in ("neg", "pos") for i in range(40)
    )
    assert 1 <= len(parts["valid"]) <= 20
    assert stored_split(TextBytes(source=str(tmp_path), length=64, labels="pos, neg")).classes == ("pos", "neg")
    assert stored_split(TextBytes(source=str(tmp_path), length=64)).classes == ("neg", "pos", "unsup")


def test_the_standard_library() -> None:
    """Each split has as many pieces of every package, no piece twice, and no file in two splits."""
    parts = {s: examples(TextBytes(source="stdlib", length=257, split=s, test_share=0.2)) for s in SPLITS}
    for split, part in parts.items():
        counts = [sum(label == package for _, label in part) for package in PACKAGES]
        assert len(set(counts)) == 1 and counts[0] >= 5, f"{split}: {counts}"
        assert {len(content) for content, _ in part} == {256}
    everything = [content for part in parts.values() for content, _ in part]
    assert len(everything) == len(set(everything)) and len(parts["train"]) > 2 * len(parts["test"]) > len(parts["valid"])
    assert b"asyncio" in b"".join(content for content, label in parts["train"] if label == "asyncio")
    again = examples(TextBytes(source="stdlib", length=257, split="test", test_share=0.2))
    assert again == parts["test"]


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def test_images_by_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {(name, i): rng.integers(256, size=(4, 4)) for name in ("cat", "dog") for i in range(12)}
    for (name, i), pixels in images.items():
        save(tmp_path / name / f"{i}.png", pixels)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    parts = [examples(Pixels(source=str(tmp_path), split=s, valid_share=0.3, test_share=0.3)) for s in SPLITS]
    wanted = sorted((pixels.astype(np.uint8).tobytes(), name) for (name, _), pixels in images.items())
    assert sorted(parts[0] + parts[1] + parts[2]) == wanted and all(parts)
    task = Pixels(source=str(tmp_path), size=2, levels=16)
    assert task.seq_length == 5 and task.rows == 17
    reduced = [Pixels(source=str(tmp_path), size=2, levels=16, split=s) for s in SPLITS]
    small = [content for part in reduced for content, _ in _or_none(part)]
    means = [(p.reshape(2, 2, 2, 2).mean(axis=(1, 3)) / 16).ravel() for p in images.values()]
    nearest = [min(np.abs(np.frombuffer(content, np.uint8) + 0.5 - mean).max() for mean in means) for content in small]
    assert len(small) == 24 and max(nearest) <= 0.6, "mean of four pixels, in steps of 16"


def test_colours_become_grey(tmp_path: Path) -> None:
    """0.299 red + 0.587 green + 0.114 blue, from image files and from CIFAR-10's own."""
    colour = np.random.default_rng(1).integers(256, size=(3, 32, 32), dtype=np.uint8)
    grey = np.rint(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
    for label in (3, 7):
        save(tmp_path / "files" / str(label) / "a.png", np.moveaxis(colour, 0, 2))
    cifar = tmp_path / "cifar"
    cifar.mkdir()
    for name, labels in {**{f"data_batch_{i}": (3, 7) for i in range(1, 6)}, "test_batch": (7, 3, 3)}.items():
        (cifar / f"{name}.bin").write_bytes(b"".join(bytes([label]) + colour.tobytes() for label in labels))
    for source, count, tolerance in ((tmp_path / "files", 2, 1), (cifar, 10, 0)):
        found = [e for s in ("train", "valid", "test") for e in _or_none(Pixels(source=str(source), split=s))]
        assert sorted({label for _, label in found}) == ["3", "7"] and len(found) == count + 3 * (source == cifar)
        for content, _ in found:
            assert np.abs(np.frombuffer(content, np.uint8).astype(int) - grey.ravel()).max() <= tolerance
    assert len(examples(Pixels(source=str(cifar), split="test"))) == 3


def _or_none(task: Pixels) -> list[tuple[bytes, str]]:
    return examples(task) if len(stored_split(task).labels) else []


def idx(array: Any) -> bytes:
    array = np.asarray(array, dtype=np.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def test_mnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pixels, labels = rng.integers(256, size=(24, 6, 6)), np.arange(24) % 4
    for name, at in (("train", slice(0, 20)), ("t10k", slice(20, 24))):
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels[at])))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[at]))
    test = examples(Pixels(source=str(tmp_path), split="test"))
    assert sorted(test) == sorted((pixels[i].astype(np.uint8).tobytes(), str(labels[i])) for i in range(20, 24))
    assert len(examples(Pixels(source=str(tmp_path)))) + len(_or_none(Pixels(source=str(tmp_path), split="valid"))) == 20
    assert Pixels(source=str(tmp_path), size=3).seq_length == 10
    with pytest.raises(DataError, match="cannot be reduced to 4 x 4"):
        Pixels(source=str(tmp_path), size=4).available()
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[20:23]))
    with pytest.raises(DataError, match="4 images have 3 labels"):
        Pixels(source=str(tmp_path), size=2).available()
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[20:24])[:-1])
    with pytest.raises(DataError, match="no idx file"):
        Pixels(source=str(tmp_path), size=1).available()


@pytest.mark.slow  # scikit-learn takes seconds to import
def test_digits_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    parts = [examples(Pixels(source="digits", split=s, test_share=0.2)) for s in SPLITS]
    data = load_digits()
    wanted = sorted(
        (image.astype(np.uint8).tobytes(), str(label)) for image, label in zip(data.images, data.target, strict=True)
    )
    assert sorted(parts[0] + parts[1] + parts[2]) == wanted and len(wanted) == 1797
    counts = np.unique([label for _, label in parts[2]], return_counts=True)[1]
    assert len(counts) == 10 and counts.min() > 0.5 * counts.max(), "every digit"
    assert Pixels(source="digits").seq_length == 65 and Pixels(source="digits").rows == 18
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="scikit-learn") as caught:
        Pixels(source="digits").read()
    assert "pip install scikit-learn" in str(caught.value)


@pytest.mark.slow
def test_all_examples_or_some() -> None:
    spec = {"task": "pixels", "source": "digits", "train": [{}], "valid": [{"examples": 50}]}
    train, valid = (SyntheticDataset(read_slices(spec, s), 3, s, 25) for s in ("train", "valid"))
    assert len(train.stores[0]) == Pixels(source="digits").available() and train.batches_per_epoch == len(train.stores[0]) // 25
    assert len(valid) == 50 and valid.seq_length == 65
    seen = [i for turn, batch in train.epoch(0) for i in train.ids(0, turn, batch).tolist()]
    assert len(seen) == len(set(seen)) == 25 * train.batches_per_epoch, "each once in an epoch"
    assert (train.sample(3).tokens == SyntheticDataset(read_slices(spec, "train"), 3, "train", 25).sample(3).tokens).all()
    with pytest.raises(DataError, match="not 500"):
        SyntheticDataset(read_slices({**spec, "valid": [{"examples": 500}]}, "valid"), 3, "valid", 25)
    with pytest.raises(ConfigError, match="examples 0"):
        read_slices({**spec, "train": [{"examples": 0}]}, "train")


def test_other_data_have_another_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for count in (20, 21):
        texts(tmp_path / f"{count}.jsonl", count)
        prints.add(TextBytes(source=str(tmp_path / f"{count}.jsonl"), test_share=0.0, valid_share=0.0).fingerprint())
        prints.add(
            TextBytes(source=str(tmp_path / f"{count}.jsonl"), test_share=0.0, valid_share=0.0, labels="1,0").fingerprint()
        )
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("text_bytes", {}, "source is missing"),
        ("text_bytes", {"source": "stdlib", "length": 1}, "at least 2"),
        ("text_bytes", {"source": "stdlib", "test_share": 0.9, "valid_share": 0.2}, "shares"),
        ("text_bytes", {"source": "stdlib", "split": "test"}, "no parameter 'split'"),
        ("pixels", {}, "source is missing"),
        ("pixels", {"source": "digits", "levels": 16}, "17 levels"),
        ("pixels", {"source": "x", "levels": 257}, "2 to 256"),
        ("pixels", {"source": "x", "size": -1}, "negative"),
    ],
)
def test_parameters_that_cannot_be(task: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(TASKS[task], values)
    assert message in str(caught.value)


def _empty(folder: Path) -> None:
    (folder / "a").mkdir()


def _no_test(folder: Path) -> None:
    (folder / "train" / "a").mkdir(parents=True)


def _one_class(folder: Path) -> None:
    save(folder / "a" / "1.png", [[1]])
    (folder / "a" / "1.txt").write_text("one")


def _sizes(folder: Path) -> None:
    save(folder / "a" / "1.png", [[1]])
    save(folder / "b" / "1.png", [[1, 2], [3, 4]])


def _damaged(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "1.png").write_bytes(b"\x89PNG no image")


def _pickles(folder: Path) -> None:
    (folder / "data_batch_1").write_bytes(b"\x80\x04")


def _short(folder: Path) -> None:
    (folder / "data_batch_1.bin").write_bytes(b"123")


@pytest.mark.parametrize(
    ("kind", "prepare", "message"),
    [
        (TextBytes, _empty, "no texts"),
        (TextBytes, _no_test, "without a test split"),
        (TextBytes, _one_class, "1 classes"),
        (Pixels, _empty, "no images"),
        (Pixels, _no_test, "without a test split"),
        (Pixels, _one_class, "1 classes"),
        (Pixels, _sizes, "several sizes"),
        (Pixels, _damaged, "cannot be read"),
        (Pixels, _pickles, "pickles"),
        (Pixels, _short, "no CIFAR-10 binary"),
    ],
)
def test_bad_folders(kind: Any, prepare: Any, message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError) as caught:
        kind(source=str(tmp_path)).available()
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", [TextBytes, Pixels])
def test_no_folder_and_no_label(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        kind(source=str(tmp_path / "none")).available()
    for name in "ab":
        save(tmp_path / name / "1.png", [[ord(name)]])
        (tmp_path / name / "1.txt").write_text(name)
    with pytest.raises(DataError, match="no example has the label 'c'") as caught:
        kind(source=str(tmp_path), labels="a,c").available()
    assert "its labels: a, b" in str(caught.value)


@pytest.mark.parametrize("line", ['{"text": 3, "label": "a"}', '{"text": "b"}', "[1]", "{", '{"text": "a", "label": null}'])
def test_bad_lines(line: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        TextBytes(source=str(path)).available()
    assert f"{path}:2" in str(caught.value)
