"""Pushing an exported folder: the real `huggingface_hub` against a small Hub of our own, and every way it can be refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from megatron.errors import ExportError
from megatron.export.hub import Destination, Upload, describe, prepare, publish, sign_in
from tests.export.hub_server import READ_ONLY, TOKEN, Hub, running_hub

FILES = {
    "config.json": json.dumps({"architectures": ["MetaLAForCausalLM"]}),
    "model.safetensors": "w" * 5000,
    "modeling_metala.py": "x = 1\n",
    "README.md": "---\nlibrary_name: transformers\n---\n\n# tiny\n",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's retries do not sleep; a login of the person who runs the tests is not used."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", os.devnull)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def parcel(tmp_path: Path) -> Upload:
    folder = tmp_path / "tiny"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in (".cache/huggingface/x.lock", "__pycache__/modeling_metala.pyc", ".git/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for others")
    return prepare(folder)


def bytes_of(parcel: Upload) -> dict[str, bytes]:
    return {name: (parcel.folder / name).read_bytes() for name in parcel.files}


def test_new_repository(hub: Hub, api: HfApi, parcel: Upload) -> None:
    done = publish(parcel, Destination("lab/tiny", private=True), sign_in(api))
    repo = hub.repos["lab/tiny"]
    assert repo.private and done.private and done.repo == "lab/tiny"
    assert repo.branches["main"] == {".gitattributes": b"", **bytes_of(parcel)} and set(parcel.files) == set(FILES)
    assert repo.commits == [("main", "MetaLAForCausalLM tiny, exported by linear-neox")]
    assert done.url.startswith(f"{hub.url}/lab/tiny/commit/") and not done.replaced and not done.removed


def test_own_namespace_branch_and_message(hub: Hub, api: HfApi, parcel: Upload) -> None:
    done = publish(parcel, Destination("tiny", revision="step7", message="Step 7"), api)
    repo = hub.repos["ada/tiny"]
    assert done.repo == "ada/tiny" and not done.private
    assert list(repo.branches["main"]) == [".gitattributes"] and set(FILES) < set(repo.branches["step7"])
    assert repo.commits == [("step7", "Step 7")]
    publish(parcel, Destination("tiny", revision="step7"), api)  # the branch is there by now
    assert len(repo.commits) == 2


def test_another_model_is_replaced_in_one_commit(hub: Hub, api: HfApi, parcel: Upload) -> None:
    api.create_repo("ada/old")
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "modeling_other.py", "tokenizer.json")
    stays = ("LICENSE", "picture.png", "README.md", "onnx/model.safetensors")
    hub.repos["ada/old"].branches["main"] |= dict.fromkeys((*old, *stays), b"old")
    done = publish(parcel, Destination("ada/old"), api)
    files = hub.repos["ada/old"].branches["main"]
    assert set(done.removed) == set(old) and done.replaced == ("README.md",) and len(hub.repos["ada/old"].commits) == 1
    assert not set(old) & set(files) and files["LICENSE"] == files["onnx/model.safetensors"] == b"old"
    assert {name: files[name] for name in FILES} == bytes_of(parcel)


def test_large_files_travel_over_lfs(hub: Hub, api: HfApi, parcel: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.large = True
    publish(parcel, Destination("ada/tiny"), api)
    assert list(hub.stored.values()) == [b"w" * 5000]
    assert {**hub.repos["ada/tiny"].branches["main"]} == {".gitattributes": b"", **bytes_of(parcel)}


def test_private_is_never_published_in_the_open(hub: Hub, api: HfApi, parcel: Upload) -> None:
    api.create_repo("ada/open")
    with pytest.raises(ExportError, match="ada/open exists and is public"):
        publish(parcel, Destination("ada/open", private=True), api)
    assert not hub.repos["ada/open"].commits


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "https://huggingface.co/a/b", "a--b", "x.git", ""])
def test_bad_names(name: str) -> None:
    with pytest.raises(ExportError, match="is no repository of the Hub"):
        Destination(name)


def test_tokens(hub: Hub, parcel: Upload) -> None:
    with pytest.raises(ExportError, match="no token for the Hugging Face Hub"):
        sign_in(HfApi(endpoint=hub.url))
    with pytest.raises(ExportError, match="may only read"):
        sign_in(HfApi(endpoint=hub.url, token=READ_ONLY))
    with pytest.raises(ExportError) as refused:
        sign_in(HfApi(endpoint=hub.url, token="hf_wrong"))
    assert "does not accept the token" in str(refused.value) and "hf_wrong" not in str(refused.value)
    assert hub.requests == ["GET /api/whoami-v2"] * 2


@pytest.mark.parametrize(
    ("repo", "status", "cut", "why"),
    [
        ("stranger/tiny", ("", 0, ""), "", "may not write there: You don't have the rights"),
        ("ada/tiny", ("preupload", 403, f"{TOKEN} is too weak"), "", "may not write there: (token) is too weak"),
        ("ada/tiny", ("/commit/", 413, "Payload Too Large"), "", "too large for the Hub"),
        ("ada/tiny", ("/commit/", 429, "Rate limited"), "", "asks to slow down"),
        ("ada/tiny", ("/commit/", 418, "teapot"), "", "the Hub answered 418: teapot"),
        ("ada/tiny", ("", 0, ""), "/commit/", "Error: "),
        ("ada/tiny", ("", 0, ""), "preupload", "Error: "),
    ],
)
def test_refused_and_interrupted(
    hub: Hub, api: HfApi, parcel: Upload, repo: str, status: tuple[str, int, str], cut: str, why: str
) -> None:
    before = bytes_of(parcel)
    hub.status, hub.cut = status, cut
    with pytest.raises(ExportError) as refused:
        publish(parcel, Destination(repo), api)
    text = str(refused.value)
    assert f"did not get to {repo}" in text and why in text and TOKEN not in text
    assert f"--folder {parcel.folder} --push-to-hub {repo}" in text and refused.value.exit_code == 6
    assert bytes_of(parcel) == before and not (repo in hub.repos and hub.repos[repo].commits)
    hub.status, hub.cut = ("", 0, ""), ""
    publish(parcel, Destination("ada/tiny"), api)  # the same command once more
    assert set(FILES) < set(hub.repos["ada/tiny"].branches["main"])


def test_card_that_the_hub_refuses(hub: Hub, api: HfApi, parcel: Upload) -> None:
    (parcel.folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(ExportError) as refused:
        publish(parcel, Destination("ada/tiny"), api)
    assert '"license" must be one of' in str(refused.value) and not hub.repos["ada/tiny"].commits


def test_offline(api: HfApi, parcel: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    try:
        with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
            sign_in(api)
    finally:
        huggingface_hub.close_session()


def test_ctrl_c_says_that_the_folder_stays(
    api: HfApi, parcel: Upload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "upload_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(parcel, Destination("ada/tiny"), api)
    assert f"the folder stays as it is; once that is mended: --folder {parcel.folder}" in capsys.readouterr().out


def test_what_is_no_exported_folder(parcel: Upload, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not an exported folder"):
        prepare(tmp_path / "nothing")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (parcel.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="not whole") as lost:
        prepare(parcel.folder)
    assert "missing: model-00001-of-00002.safetensors" in str(lost.value)
    (parcel.folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ExportError, match="not an exported folder"):
        prepare(parcel.folder)


def test_description(parcel: Upload) -> None:
    said = describe(parcel, Destination("tiny", private=True, revision="b", message="m"))
    assert said.splitlines()[:5] == [
        "repository: tiny (in the namespace of the token's owner)",
        "visibility: private",
        "branch: b",
        "commit message: m",
        f"files: 4, {sum(map(len, FILES.values())):,} bytes",
    ]
    assert "  5,000  model.safetensors" in said and "not for others" not in said and ".git" not in said
    assert "public, unless set otherwise" in describe(parcel, Destination("a/b"))
