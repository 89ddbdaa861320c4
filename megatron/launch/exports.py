"""Which environment variables are sent to the ranks: an allow list, and never a secret.

DeepSpeed's runners write exported variables on a command line (`pdsh ... export NAME=VALUE; ...`, `mpirun -x NAME=VALUE`),
which every user of every host can read and which ends up in logs. So a variable is sent only if it matters to a rank or is
named in `export_env`, and a variable that looks like a secret is never sent.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron.errors import LaunchError

# What a rank needs from the launching shell: to find programs, to reach other ranks, to use the same threads and caches.
ALLOWED = (
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONUNBUFFERED", "VIRTUAL_ENV", "LOGLEVEL", "TZ", "LANG",
    "DS_ACCELERATOR", "OMP_*", "GOMP_*", "MKL_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_HOME", "NCCL_*", "GLOO_*",
    "UCX_*", "TORCH_*", "TORCHINDUCTOR_*", "PYTORCH_*", "TRITON_*", "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_HUB_OFFLINE",
    "HF_DATASETS_*", "TRANSFORMERS_*", "WANDB_MODE",
    "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI",
)  # fmt: skip
# Prefixes of the variables that DeepSpeed's runners always write on the command line.
_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")
_WORDS = r"KEYS?|APIKEY|TOKENS?|SECRETS?|PASS|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH|COOKIE|[A-Z0-9]*PASSWORD"
_SECRET = re.compile(rf"(?:^|_)(?:{_WORDS})(?:_|$)", re.IGNORECASE)
_LOGIN = re.compile(r"://[^/\s:@]*:[^/\s@]+@")  # https://user:password@host


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LaunchError("the file of exported variables cannot be read", where=str(path), why=str(error)) from error


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is a secret: by its name (WANDB_API_KEY, HF_TOKEN, ..._PASSWORD), or as a URL with a password."""
    return bool(_SECRET.search(name) or _LOGIN.search(value))


def exported(environ: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """The variables to send to every rank, sorted by name.

    Args:
        environ: the launching shell's variables.
        more: names or patterns (`MY_*`) of `export_env`.

    Raises:
        LaunchError: `export_env` names a secret.
    """
    more = tuple(more)
    for name in more:
        if is_secret(name, environ.get(name, "")):
            raise LaunchError(
                f"export_env: {name} looks like a secret and is not sent",
                why="exported variables are on a command line that all users of all hosts can read",
                hint="put it on the hosts themselves: `wandb login`, `huggingface-cli login`, a Kubernetes secret",
            )
    names = sorted(n for n in environ if any(fnmatch.fnmatchcase(n, pattern) for pattern in (*ALLOWED, *more)))
    return {name: environ[name] for name in names if not is_secret(name, environ[name])}


def withheld(environ: Mapping[str, str]) -> list[str]:
    """Secrets of this shell that a training run would use and that are not sent; for a warning."""
    used = ("WANDB_", "HF_", "HUGGING_FACE", "MLFLOW_", "COMET_")
    return sorted(name for name, value in environ.items() if name.startswith(used) and is_secret(name, value))


def launcher_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for DeepSpeed's runner, without the secrets that it would write on a command line."""
    return {n: v for n, v in environ.items() if not (n.startswith(_DEEPSPEED) and is_secret(n, v))}


def user_file(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Read the user's `.deepspeed_env` (in the home folder, then here; DS_ENV_FILE renames it): one NAME=VALUE per line.

    Raises:
        LaunchError: a line is not an assignment, or assigns a secret.
    """
    name, variables = environ.get("DS_ENV_FILE", ".deepspeed_env"), {}
    for folder in (home, Path(".")):
        path = folder / name
        if not path.is_file():
            continue
        for number, line in enumerate(_text_of(path).splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, equals, value = line.partition("=")
            if not equals or not re.fullmatch(r"\w+", key.strip()):
                raise LaunchError(f"'{line}' is not NAME=VALUE", where=f"{path}:{number}")
            if is_secret(key.strip(), value):
                raise LaunchError(
                    f"{key.strip()} looks like a secret",
                    where=f"{path}:{number}",
                    why="the launcher would write it on a command line",
                )
            variables[key.strip()] = value.strip()
    return variables


def environment_file(variables: Mapping[str, str], through_pdsh: bool = False) -> str:
    """The environment file that DeepSpeed's runner reads.

    Args:
        variables: name -> value.
        through_pdsh: double every `%`, because pdsh replaces `%h` and others.

    Raises:
        LaunchError: the runner's quoting would break a name or value.
    """
    for name, value in variables.items():
        if not re.fullmatch(r"\w+", name) or re.search(r"[\"$`\\\n\r]", value):
            raise LaunchError(
                f"the value of {name if name.isidentifier() else ascii(name)} cannot be sent to other hosts",
                why='the launcher does not quote " $ ` \\ and line ends, nor names of other than letters and digits',
            )
    return "".join(f"{name}={value.replace('%', '%%') if through_pdsh else value}\n" for name, value in variables.items())


def check_own_exports(environ: Mapping[str, str]) -> None:
    """Check variables that DeepSpeed's runner always sends in double quotes: a remote shell expands `$` and backticks.

    Raises:
        LaunchError: a value contains such characters.
    """
    environment_file({n: v for n, v in environ.items() if n.startswith(_DEEPSPEED) and not is_secret(n, v)})
