"""Pushes an exported folder to the Hugging Face Hub through `huggingface_hub`: checked first, as one commit, with a dry run.

A push to an existing repository is one new commit on its branch. Files of the same name are replaced; files at its
root that a loader would mistake for parts of the model are removed in the same commit; all other files stay,
and the history keeps the old model. With `private`, nothing is pushed to a public repository.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported, not marked as such

from megatron.errors import ExportError
from megatron.files import read_json

MAIN = "main"
_LOADED = (
    *(
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "modeling_*.py",
        "configuration_*.py",
        "tokenization_*.py",
    ),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.json", "adapter_model.*"),
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
"""Names at a repository's root that `from_pretrained` would read in addition to, or instead of, a new model's files."""
_LOGIN = "`hf auth login`, or HF_TOKEN in the environment, with a token that may write"


@dataclass(frozen=True)
class Destination:
    """The target of a push.

    Attributes:
        repo: OWNER/NAME, or NAME in the namespace of the token's owner.
        private: push to a private repository only; without it a new repository has the account's default visibility.
        revision: branch; created if it does not exist.
        message: commit message; empty: derived from the folder.
    """

    repo: str
    private: bool = False
    revision: str = MAIN
    message: str = ""

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"'{self.repo}' is not a repository name of the Hub", why=reason, hint="OWNER/NAME") from None


@dataclass(frozen=True)
class PushResult:
    """The result of a push.

    Attributes:
        repo: full name of the repository.
        url: URL of the commit.
        private: the repository is private.
        replaced: files that existed before and were replaced.
        removed: files of an earlier model that were removed.
    """

    repo: str
    url: str
    private: bool
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upload:
    """A checked folder, ready to push.

    Attributes:
        folder: the exported folder.
        files: path inside the folder -> size in bytes.
        title: class name of the model, for the commit message.
    """

    folder: Path
    files: Mapping[str, int]
    title: str = field(default="")


def prepare(folder: str | Path) -> Upload:
    """Check that `folder` is a complete exported model and list its files.

    Args:
        folder: an exported folder with its weights.

    Returns:
        The files, without hidden files and Python's caches.

    Raises:
        ExportError: the folder does not exist, holds no model, or lacks weights that its index names.
    """
    folder = Path(folder)
    hint = "name a folder that tools/convert_to_hf.py wrote"
    try:
        settings = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        missing = sorted(name for name in shards if not (folder / name).is_file())
        inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        visible_paths = [path for path in inside if not any(name.startswith((".", "__pycache__")) for name in path.parts)]
        files = {path.as_posix(): (folder / path).stat().st_size for path in visible_paths}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError("not an exported folder", where=str(folder), why=str(error), hint=hint) from None
    if missing:
        raise ExportError("the folder is incomplete", where=str(folder), why=f"missing: {', '.join(missing)}", hint=hint)
    return Upload(folder, files, str((settings.get("architectures") or ["model"])[0]))


def _message(upload: Upload, destination: Destination) -> str:
    return destination.message or f"{upload.title} {upload.folder.resolve().name}, exported by linear-neox"


def describe(upload: Upload, destination: Destination) -> str:
    """Describe a push without contacting the Hub.

    Args:
        upload: the checked folder.
        destination: the target.

    Returns:
        Lines for the console: repository, visibility, branch, commit message, files with their sizes.
    """
    name = destination.repo if "/" in destination.repo else f"{destination.repo} (in the namespace of the token's owner)"
    visibility = (
        "private" if destination.private else "the account's default for a new repository (public, unless set otherwise)"
    )
    width = max(len(f"{size:,}") for size in upload.files.values())
    return "\n".join(
        [
            f"repository: {name}",
            f"visibility: {visibility}",
            f"branch: {destination.revision}",
            f"commit message: {_message(upload, destination)}",
            f"files: {len(upload.files)}, {sum(upload.files.values()):,} bytes",
            *(f"  {size:>{width},}  {file}" for file, size in upload.files.items()),
        ]
    )


def sign_in(api: HfApi | None = None) -> HfApi:
    """Connect to the Hub and check the token, before anything long begins.

    Args:
        api: for tests; default: `HF_ENDPOINT` with the token from the usual places.

    Returns:
        An API with a valid token that has write access.

    Raises:
        ExportError: the token is missing, refused or read-only, or the Hub is unreachable.
    """
    api = api or HfApi()
    try:
        account = api.whoami()
    except LocalTokenNotFoundError:
        raise ExportError("no token for the Hugging Face Hub", why="nobody is logged in on this machine", hint=_LOGIN) from None
    except Exception as error:  # the library lets through whatever its HTTP client raises
        raise _refusal("the Hub cannot be reached", error, api) from None
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ExportError("the token may only read", where=f"account {account.get('name')}", hint=_LOGIN)
    return api


def publish(upload: Upload, destination: Destination, api: HfApi) -> PushResult:
    """Create the repository if needed and push the folder as one commit (very many files: several commits).

    Args:
        upload: the checked folder; read only.
        destination: the target.
        api: from `sign_in`.

    Returns:
        Repository, commit and changed files.

    Raises:
        ExportError: the Hub refuses or is unreachable, or the repository is public despite `private`. The folder stays.
    """
    again = f"the folder is unchanged; to retry: --folder {upload.folder} --push-to-hub {destination.repo}"
    try:
        repo = api.create_repo(destination.repo, private=destination.private or None, exist_ok=True).repo_id
        private = bool(api.model_info(repo).private)
        if destination.private and not private:
            raise ExportError(
                f"{repo} exists and is public", why="--private is set; nothing was sent", hint="name another repository"
            )
        if destination.revision != MAIN:
            api.create_branch(repo, branch=destination.revision, exist_ok=True)
        remote_files = api.list_repo_files(repo, revision=destination.revision)
        removed = _stale(remote_files, upload.files)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=upload.folder,
            revision=destination.revision,
            commit_message=_message(upload, destination),
            allow_patterns=[glob.escape(name) for name in upload.files],
            delete_patterns=[glob.escape(name) for name in removed] or None,
        )
    except ExportError:
        raise
    except KeyboardInterrupt:
        print(f"stopped while sending {upload.folder}; {again}", flush=True)
        raise
    except Exception as error:  # the library lets through whatever its HTTP client and storage raise
        raise _refusal(f"{upload.folder} was not pushed to {destination.repo}", error, api, again) from None
    replaced = tuple(name for name in remote_files if name in upload.files)
    return PushResult(repo, commit.commit_url, private, replaced, removed)


def _stale(remote_files: Sequence[str], files: Mapping[str, int]) -> tuple[str, ...]:
    """Files of an earlier model that a loader would still read."""
    return tuple(
        name
        for name in remote_files
        if name not in files and any(fnmatch.fnmatchcase(name, p) for p in _LOADED) and "/" not in name
    )


_CAUSES = {
    401: ("the Hub does not accept the token", _LOGIN),
    403: ("the token may not write there", "a token with write access to that owner's repositories"),
    404: ("there is no such repository or branch, or the token cannot see it", None),
    413: ("a file or the commit is too large for the Hub", "export again with a smaller --max-shard-size"),
    429: ("the Hub asks to slow down", None),
}


def _refusal(what: str, error: Exception, api: HfApi, again: str | None = None) -> ExportError:
    """One error for what the library raised; without URL queries (may be signed) and the token (may be quoted)."""
    where, hint = str(api.endpoint), None
    if isinstance(error, OfflineModeIsEnabled):
        why, hint = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        why, hint = _CAUSES.get(status, (f"the Hub answered {status}", None))
        why += f": {_first(error.server_message)}" if error.server_message else ""
    else:
        why = f"{type(error).__name__}: {_first(str(error))}"
    token = api.token if isinstance(api.token, str) else get_token()
    if token:
        why = why.replace(token, "(token)")
    return ExportError(what, where=where, why=why, hint="; ".join(text for text in (hint, again) if text) or None)


def _first(text: Any) -> str:
    """All lines as one, without the query strings of URLs."""
    return " ".join(word.partition("?")[0] if "://" in word else word for word in str(text).split())[:300]
