"""GPT-NeoX's commands under tools/ckpts: run as ours where the arguments carry over, else one line says what does their work.

python tools/ckpts/convert_neox_to_hf.py --input_dir RUN/checkpoints/global_step1000 --output_dir my-model
python tools/ckpts/inspect_checkpoints.py RUN/checkpoints/global_step1000
python tools/ckpts/upload.py my-model OWNER/NAME main
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.errors import ConfigError, exit_on_error

TOOLS = Path(__file__).resolve().parents[1]
_DTYPES = {"auto": "auto", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{name}.py", description=f"GPT-NeoX's {name}.py.", allow_abbrev=False)


def _hf_folder(words: Sequence[str]) -> list[str]:
    """convert_neox_to_hf.py: a checkpoint of ours is exported; one of NeoX itself is imported first."""
    p = _parser("convert_neox_to_hf")
    p.add_argument("--input_dir", required=True, help="global_stepN folder")
    p.add_argument("--config_file", help="NeoX's YAML; a checkpoint of ours knows its model")
    p.add_argument("--output_dir", required=True, help="new folder to write")
    p.add_argument("--precision", default="auto", choices=list(_DTYPES))
    p.add_argument("--architecture", help="found by itself")
    p.add_argument("--pad-token-id", help="that of the checkpoint's tokenizer")
    p.add_argument("--no_save_tokenizer", action="store_true", help="the tokenizer is always saved")
    p.add_argument("--vocab-is-hf-tokenizer", action="store_true", help="found by itself")
    a = p.parse_args(list(words))
    if Path(a.input_dir).is_dir() and not _is_ours(Path(a.input_dir)):
        configs = [a.config_file] if a.config_file else []
        first = ["python", "tools/checkpoint.py", "import", a.input_dir, *configs, "--output", "IMPORTED"]
        second = ["python", "tools/convert_to_hf.py", "--checkpoint", "IMPORTED", "--output", a.output_dir]
        raise ConfigError(
            "this is no checkpoint of ours",
            where=a.input_dir,
            hint=f"one of GPT-NeoX is imported first: {shlex.join(first)}; then {shlex.join(second)}",
        )
    return ["convert_to_hf.py", "--checkpoint", a.input_dir, "--output", a.output_dir, "--dtype", _DTYPES[a.precision]]


def _is_ours(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or any(folder.glob("global_step*/manifest.json"))


def _inspect(words: Sequence[str]) -> list[str]:
    """inspect_checkpoints.py: of one checkpoint, or `--compare` of two."""
    p = _parser("inspect_checkpoints")
    p.add_argument("dir", help="global_stepN folder")
    p.add_argument("--compare", "-c", metavar="DIR", help="compare with this one")
    p.add_argument("--diff", "-d", action="store_true", help="differences are all that is printed")
    p.add_argument("--attributes", "-a", nargs="*", help="every tensor is listed with them")
    p.add_argument("--interactive", "-i", action="store_true", help="not offered here")
    a = p.parse_args(list(words))
    return ["checkpoint.py", "diff", a.dir, a.compare] if a.compare else ["checkpoint.py", "inspect", a.dir]


def _upload(words: Sequence[str]) -> list[str]:
    """upload.py FOLDER REPO BRANCH."""
    p = _parser("upload")
    p.add_argument("folder")
    p.add_argument("repo")
    p.add_argument("branch", nargs="?", default="main")
    a = p.parse_args(list(words))
    return ["convert_to_hf.py", "--folder", a.folder, "--push-to-hub", a.repo, "--revision", a.branch]


def _llama(words: Sequence[str]) -> list[str]:
    """convert_hf_llama_to_neox.py: any mesh reads what is written, so `--tp` and `--pp` have nothing to say."""
    p = _parser("convert_hf_llama_to_neox")
    p.add_argument("--model", required=True, help="folder of a Hugging Face model")
    p.add_argument("--model_path", required=True, help="checkpoint folder to write")
    p.add_argument("--tp", type=int, default=1, help="any mesh reads the checkpoint")
    p.add_argument("--pp", type=int, default=0, help="any mesh reads the checkpoint")
    a = p.parse_args(list(words))
    if not Path(a.model).is_dir():
        raise ConfigError(
            f"there is no folder {a.model}", hint=f"hf download {a.model} --local-dir FOLDER, then --model FOLDER"
        )
    return ["convert_from_hf.py", "--input", a.model, "--output", a.model_path]


# NeoX's command -> its arguments as a command line of ours
LEADS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "convert_neox_to_hf": _hf_folder,
    "inspect_checkpoints": _inspect,
    "upload": _upload,
    "convert_hf_llama_to_neox": _llama,
}
# NeoX's command -> what to do instead
POINTERS: dict[str, str] = {
    "convert_hf_to_sequential": "python tools/convert_from_hf.py --input HF_FOLDER --output CHECKPOINTS reads it for any mesh",
    "convert_neox_to_mamba_ssm": "python tools/convert_to_hf.py --checkpoint CHECKPOINT --output FOLDER exports Mamba too",
    "convert_raw_llama_weights_to_neox": (
        "Meta's own files are not read: take the Hugging Face folder of the model, and "
        "python tools/convert_from_hf.py --input HF_FOLDER --output CHECKPOINTS"
    ),
    "merge20b": (
        "python tools/checkpoint.py import NEOX/global_stepN 20B.yml --output CHECKPOINTS joins the parts; any mesh reads it"
    ),
}


def lead(name: str) -> None:
    """Be GPT-NeoX's command `name`: end with the exit code of ours, or with 2 and one line that names it."""
    with exit_on_error():
        if name in POINTERS:
            raise ConfigError(f"GPT-NeoX's {name}.py is not offered here", hint=POINTERS[name])
        tool, *rest = LEADS[name](sys.argv[1:])
        print(f"runs: {shlex.join(['python', f'tools/{tool}', *rest])}", file=sys.stderr, flush=True)
        sys.argv = [str(TOOLS / tool), *rest]
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
