"""What `generate.py` does of the three kinds: prompts that are named are read, or it is said why not."""

from __future__ import annotations

from pathlib import Path

import pytest

import generate as command
from megatron.config.cli import config_from_args, make_parser
from megatron.errors import ConfigError
from tests.tiny_run import write_run

FROM_FILE = {"text_gen_type": "unconditional", "sample_input_file": "a.txt"}


@pytest.mark.parametrize(
    ("values", "words", "kind", "said"),
    [
        ({}, [], "unconditional", ""),
        ({}, ["-i", "p.txt"], "input-file", ""),
        ({"text_gen_type": "input-file"}, ["-i", "p.txt"], "input-file", ""),
        ({"text_gen_type": "unconditional"}, ["-i", "p.txt"], "input-file", "prompts of p.txt, though text_gen_type is uncond"),
        ({"text_gen_type": "interactive"}, ["--set", "sample_input_file=p.txt"], "input-file", "though text_gen_type is inter"),
        (FROM_FILE, [], "unconditional", "a.txt is not read"),
        (FROM_FILE, ["--set", "text_gen_type=input-file"], "input-file", ""),
        ({"sample_input_file": "a.txt"}, ["--set", "text_gen_type=interactive"], "interactive", "a.txt is not read"),
    ],
)
def test_prompts_are_not_dropped_in_silence(
    values: dict[str, str],
    words: list[str],
    kind: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = make_parser("").parse_intermixed_args([str(write_run(tmp_path, **values)), *words])
    assert command._kind(config_from_args(arguments, check=False)) == kind
    heard = capsys.readouterr().err
    assert said in heard and bool(heard) == bool(said)


def test_prompts_and_a_kind_without_any_contradict(tmp_path: Path) -> None:
    words = ["-i", "p.txt", "--set", "text_gen_type=unconditional"]
    with pytest.raises(ConfigError, match="takes no prompts, but p.txt holds some"):
        command.main([str(write_run(tmp_path)), *words])


def test_an_empty_prompt_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_end is empty"):
        command.main([str(write_run(tmp_path, prompt_end="")), "-i", "p.txt"])
