"""An exported folder onto the Hugging Face Hub, through `huggingface_hub`: checked first, said before it happens, one commit.

What a push does to a repository that exists: one new commit on its branch. Files of the same name are replaced; files at its
root that a loader would take for parts of the model, and that the folder lacks, are removed in the same commit; all else stays,
and the history keeps the old model. Nothing is pushed to a public repository under `private`.
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
"""Names at a repository's root that `from_pretrained` would read beside, or instead of, a new model's files."""
_LOGIN = "`hf auth login`, or HF_TOKEN in the environment, with a token that may write"


@dataclass(frozen=True)
class Destination:
    """Where a folder goes.

    repo: OWNER/NAME, or NAME in the namespace of the token's owner. private: only into a repository that others cannot see;
    without it a new repository is as the account's default says. revision: branch, made when it is not there.
    message: of the commit, empty for one made from the folder.
    """

    repo: str
    private: bool = False
    revision: str = MAIN
    message: str = ""

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            why = str(error).splitlines()[0]
            raise ExportError(f"'{self.repo}' is no repository of the Hub", why=why, hint="OWNER/NAME") from None


@dataclass(frozen=True)
class Published:
    """What was done.

    repo: full name. url: of the commit. private: whether others cannot see it. replaced, removed: files that it held
    before.
    """

    repo: str
    url: str
    private: bool
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upload:
    """A checked folder, ready to be sent.

    files: path inside the folder -> bytes, as they are sent. title: for the commit message.
    """

    folder: Path
    files: Mapping[str, int]
    title: str = field(default="")


def prepare(folder: str | Path) -> Upload:
    """Check that `folder` is a whole exported model and list what would be sent.

    Args:
        folder: written by an export, complete with its weights.

    Returns:
        The files, without hidden ones and Python's caches.

    Raises:
        ExportError: no folder, no model in it, or weights that its index names are missing.
    """
    folder = Path(folder)
    hint = "name a folder that tools/convert_to_hf.py wrote"
    try:
        settings = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        missing = sorted(name for name in shards if not (folder / name).is_file())
        inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        kept = [path for path in inside if not any(part.startswith((".", "__pycache__")) for part in path.parts)]
        files = {path.as_posix(): (folder / path).stat().st_size for path in kept}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError("not an exported folder", where=str(folder), why=str(error), hint=hint) from None
    if missing:
        raise ExportError("the folder is not whole", where=str(folder), why=f"missing: {', '.join(missing)}", hint=hint)
    return Upload(folder, files, str((settings.get("architectures") or ["model"])[0]))


def _message(parcel: Upload, destination: Destination) -> str:
    return destination.message or f"{parcel.title} {parcel.folder.resolve().name}, exported by linear-neox"


def describe(parcel: Upload, destination: Destination) -> str:
    """What a push would do, as far as it can be said without the Hub.

    Args:
        parcel: the checked folder.
        destination: where it would go.

    Returns:
        Lines for the screen: repository, visibility, branch, commit message, files with their sizes.
    """
    name = destination.repo if "/" in destination.repo else f"{destination.repo} (in the namespace of the token's owner)"
    seen = "private" if destination.private else "the account's default if it is made now (public, unless set otherwise)"
    width = max(len(f"{size:,}") for size in parcel.files.values())
    return "\n".join(
        [
            f"repository: {name}",
            f"visibility: {seen}",
            f"branch: {destination.revision}",
            f"commit message: {_message(parcel, destination)}",
            f"files: {len(parcel.files)}, {sum(parcel.files.values()):,} bytes",
            *(f"  {size:>{width},}  {file}" for file, size in parcel.files.items()),
        ]
    )


def sign_in(api: HfApi | None = None) -> HfApi:
    """The door to the Hub, tried before anything long begins.

    Args:
        api: tests give one; by default that of `HF_ENDPOINT` with the token of the usual places.

    Returns:
        An API whose token the Hub knows and that may write.

    Raises:
        ExportError: no token, a refused or read-only one, or no way to the Hub.
    """
    api = api or HfApi()
    try:
        account = api.whoami()
    except LocalTokenNotFoundError:
        raise ExportError("no token for the Hugging Face Hub", why="nobody is logged in on this machine", hint=_LOGIN) from None
    except Exception as error:  # the library passes on whatever its HTTP client raises
        raise _refusal("the Hub cannot be asked", error, api) from None
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ExportError("the token may only read", where=f"account {account.get('name')}", hint=_LOGIN)
    return api


def publish(parcel: Upload, destination: Destination, api: HfApi) -> Published:
    """Make the repository where it is missing and send the folder as one commit (very many files: several).

    Args:
        parcel: the checked folder; it is only read.
        destination: where it goes.
        api: of `sign_in`.

    Returns:
        What was done.

    Raises:
        ExportError: the Hub refuses, cannot be reached, or the repository is public under `private`. The folder stays.
    """
    again = f"the folder stays as it is; once that is mended: --folder {parcel.folder} --push-to-hub {destination.repo}"
    try:
        repo = api.create_repo(destination.repo, private=destination.private or None, exist_ok=True).repo_id
        private = bool(api.model_info(repo).private)
        if destination.private and not private:
            raise ExportError(
                f"{repo} exists and is public", why="--private was asked for; nothing was sent", hint="name another repository"
            )
        if destination.revision != MAIN:
            api.create_branch(repo, branch=destination.revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=destination.revision)
        removed = _stale(there, parcel.files)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=parcel.folder,
            revision=destination.revision,
            commit_message=_message(parcel, destination),
            allow_patterns=[glob.escape(name) for name in parcel.files],
            delete_patterns=[glob.escape(name) for name in removed] or None,
        )
    except ExportError:
        raise
    except KeyboardInterrupt:
        print(f"stopped while sending {parcel.folder}; {again}", flush=True)
        raise
    except Exception as error:  # the library passes on whatever its HTTP client and its storage raise
        raise _refusal(f"{parcel.folder} did not get to {destination.repo}", error, api, again) from None
    replaced = tuple(name for name in there if name in parcel.files)
    return Published(repo, commit.commit_url, private, replaced, removed)


def _stale(there: Sequence[str], files: Mapping[str, int]) -> tuple[str, ...]:
    """Files of an earlier model that a loader would still find."""
    return tuple(
        name for name in there if name not in files and any(fnmatch.fnmatchcase(name, p) for p in _LOADED) and "/" not in name
    )


_CAUSES = {
    401: ("the Hub does not accept the token", _LOGIN),
    403: ("the token may not write there", "a token with write access to that owner's repositories"),
    404: ("there is no such repository or branch, or the token cannot see it", None),
    413: ("a file or the commit is too large for the Hub", "export again with a smaller --max-shard-size"),
    429: ("the Hub asks to slow down", None),
}


def _refusal(what: str, error: Exception, api: HfApi, again: str | None = None) -> ExportError:
    """One message of what the library raised; addresses may be signed and a token may be quoted, so neither is repeated."""
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
    return ExportError(what, where=where, why=why, hint="; ".join(part for part in (hint, again) if part) or None)


def _first(text: Any) -> str:
    """All lines as one, without what an address carries behind its question mark."""
    return " ".join(word.partition("?")[0] if "://" in word else word for word in str(text).split())[:300]
