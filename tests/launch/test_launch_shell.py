"""Nothing of a configuration reaches a shell: every key of text is given all that a shell acts upon, and pdsh is stood in for.

The stand-in does what pdsh does: it takes its options, joins the other words with blanks, replaces `%h`, `%u`, `%n` and `%%`,
and hands the result to a shell (that of ssh's other end). What would be executed touches a file; words must arrive as they are.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import deepy
from megatron.config.neox_keys import neox_keys
from megatron.config.schema import key_fields
from megatron.errors import UserError
from megatron.launch import shell_safety as shell_words
from megatron.launch.job import Job, plan_job
from megatron.launch.options import SUPERVISOR, LaunchOptions, Machine
from megatron.launch.preview import runner_command
from tests.launch.tiny_run import write_run

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")
LAUNCH_KEYS = ("hostfile", "include", "exclude", "master_addr", "launcher_args", "export_env", "comment", "account")


def hostile(folder: Path) -> dict[str, str]:
    """Values that a shell would act upon; those that it would execute touch `<folder>/pwned`."""
    touch = f"touch {folder}/pwned"
    parts = {
        "semicolon": f"127.0.0.1;{touch};",
        "first word": touch,
        "option and word": f"-t 5 {touch};",
        "substitution": f"a$({touch})",
        "backticks": f"`{touch}`",
        "line end": f"a\n{touch}\n",
        "carriage return": f"a\r{touch}",
        "quotes": f"a'b\"c';{touch};\"",
        "backslash": f'a\\" ;{touch};',
        "blanks and signs": "a b\tc $HOME ~ * %h%n%u%% #x !x",
        "pipe": f"a|{touch}&{touch}<x>{folder}/pwned",
        "ssh option": f"-oProxyCommand={touch}",
    }
    return parts | {"all": "".join(parts.values())}


def takes_text(annotation: Any) -> bool:
    """Whether values of a key may be, or hold, any text."""
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return annotation in (str, Any) or any(takes_text(inner) for inner in typing.get_args(annotation))


OWN = [key for key, field in key_fields().items() if takes_text(field.info.annotation)]
TEXT_KEYS = [*OWN, *(key for key, row in neox_keys().items() if row.kind == "str" and key not in key_fields())]


class Hosts:
    """Two hosts behind the stand-in. python: of the hosts, which notes what it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python, self.log = folder, folder / "python", folder / "argv"
        self.python.write_text(
            f"#!{sys.executable} -S\nimport json, sys\nopen({str(self.log)!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
        )
        self.python.chmod(0o755)
        (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
        (folder / "named").write_text("hosts")
        self.run = functools.cache(self._run)

    def _run(self, command: tuple[str, ...]) -> list[list[str]]:
        """What the first host's python was given by `pdsh ...`."""
        words = list(command[1:])
        while words and words[0].startswith("-"):
            del words[: 1 if words[0] in ("-S", "-b", "-d", "-N", "-q") or len(words[0]) > 2 else 2]
        known = {"h": "n1", "u": "me", "n": "0", "%": "%"}
        text = re.sub("%([hun%])", lambda match: known[match.group(1)], " ".join(words))
        self.log.unlink(missing_ok=True)
        subprocess.run(["sh", "-c", text], capture_output=True, check=False, timeout=20)
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    made = Hosts(tmp_path)
    machine = Machine((), 4, str(made.python))
    monkeypatch.setattr(deepy, "this_machine", lambda: machine)
    monkeypatch.setattr(deepy, "addresses", lambda names: dict.fromkeys(names, "10.0.0.1"))
    for name in [name for name in os.environ if name.startswith(("NCCL", "MLFLOW", "PYTHON", "UCX", "MV2"))]:
        monkeypatch.delenv(name)
    return made


def planned(monkeypatch: pytest.MonkeyPatch, *words: str) -> Job | str:
    """The job that `deepy.py WORDS` would start, or the message of its refusal."""
    jobs: list[Job] = []
    monkeypatch.setattr(deepy, "run_job", lambda job: (jobs.append(job), (0, ""))[1])
    try:
        assert deepy.main([TRAIN, *words]) == 0
    except UserError as error:
        return str(error)
    return jobs[0]


def check(hosts: Hosts, job: Job, *words: str) -> None:
    """Both hosts get our words, and no others."""
    assert job.launcher == "pdsh"
    (got,) = hosts.run(runner_command(job))
    at = got.index(SUPERVISOR)
    assert got[at + 1 :] == ["--watch-stdin", TRAIN, *words] and "--master_port=" in " ".join(got[:at])
    assert not (hosts.folder / "pwned").exists()


@pytest.mark.slow
def test_every_key_of_text(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through YAML. A key that decides on the launch is given each kind of value by itself, another one all of them at once."""
    assert len(OWN) > 40 and set(LAUNCH_KEYS) < set(OWN)
    accepted, values = set(), hostile(hosts.folder)
    config = write_run(hosts.folder / "data", hostfile=str(hosts.folder / "hosts"), num_gpus=1)
    plain = json.loads(config.read_text())
    for key in TEXT_KEYS:
        for kind, value in values.items() if key in LAUNCH_KEYS else (("all", values["all"]),):
            given: Any = [value] if key == "export_env" else value
            config.write_text(json.dumps(plain | {key: given}))
            job = planned(monkeypatch, str(config))
            if isinstance(job, str):
                assert not (hosts.folder / "pwned").exists(), (key, kind)
                continue
            accepted.add(key)
            if job.route == "hosts":  # a host file that does not exist is a run on this machine, as DeepSpeed has it
                check(hosts, job, str(config))
    assert {"run_dir", "save", "wandb_run_name", "comment", "hostfile"} <= accepted, "what is not refused arrives nowhere"
    assert not {"master_addr", "include", "exclude"} & accepted


def test_arguments_arrive_as_they_were_typed(hosts: Hosts) -> None:
    machine = Machine((), 4, str(hosts.python))
    for value in ["", *hostile(hosts.folder).values()]:
        words = ["a.yml", "--set", value, f" {value}"]
        check(hosts, plan_job(LaunchOptions(hostfile="h"), machine, TRAIN, words, port=1, pool={"n1": 1, "n2": 1}), *words)


@pytest.mark.parametrize("kind", sorted(hostile(Path("/x"))))
@pytest.mark.parametrize("key", ["master_addr", "launcher_args"])
def test_words_of_launchers_are_refused_by_name(key: str, kind: str) -> None:
    value = hostile(Path("/x"))[kind]
    # mpirun's options are not known one by one: what looks like one is taken for one
    for launcher in ("pdsh", "openmpi", "mpich") if (key, kind) != ("launcher_args", "ssh option") else ("pdsh",):
        options = LaunchOptions(hostfile="h", launcher=launcher, **{key: value})
        with pytest.raises(UserError, match=key):
            plan_job(options, Machine((), 4, "/py"), "train.py", [], port=1, pool={"n1": 1, "n2": 1})


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a;b", "a$(b)", "^file", "n[1-3]", "a,b", "%h", "-x"])
def test_hosts_are_names(name: str, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    (hosts.folder / "hosts").write_text(f"{name} slots=1\nn2 slots=1\n")
    config = write_run(hosts.folder / "data", hostfile=str(hosts.folder / "hosts"), num_gpus=1)
    assert "is not a host name" in str(planned(monkeypatch, str(config)))


@pytest.mark.parametrize("name", ["node-1.cluster", "10.0.0.7", "me@node", "fe80::1"])
def test_names_of_hosts(name: str) -> None:
    assert shell_words.is_host(name)
    shell_words.check_address(name.replace("me@", ""))


@pytest.mark.parametrize(
    ("text", "launcher"),
    [
        ("-t 30 -u 600", "pdsh"),
        ("-t30 -l me -b", "pdsh"),
        ("--mca btl_tcp_if_include ib0 -x A=1", "openmpi"),
        ("--comment='a b' --export=ALL", "slurm"),
        ("", "pdsh"),
    ],
)
def test_options_of_launchers(text: str, launcher: str) -> None:
    assert shell_words.launcher_words(text, launcher) == shlex.split(text)


@pytest.mark.parametrize("text", ["-R exec", "-w n9", "-x", "-t", "-g all", "'", "x -t 5"])
def test_options_of_pdsh_that_would_change_what_runs_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="launcher_args"):
        shell_words.launcher_words(text, "pdsh")


def test_exported_variables(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values travel in the runner's double quotes, `%` is doubled for pdsh, and what would be acted upon is refused."""
    config = write_run(hosts.folder / "data", hostfile=str(hosts.folder / "hosts"), num_gpus=1, export_env=["MY_*"])
    monkeypatch.setenv("MY_WORDS", "a b;touch x 'c' %h|d&")
    job = planned(monkeypatch, str(config))
    assert isinstance(job, Job)
    line = next(word for word in runner_command(job) if "MY_WORDS" in word).replace("%%", "%")
    echo = subprocess.run(["sh", "-c", f'{line} printf %s "$MY_WORDS"'], capture_output=True, text=True, check=True)
    assert echo.stdout == "a b;touch x 'c' %h|d&"
    for name, value in (
        ("MY_WORDS", "$(x)"),
        ("MY_WORDS", "a\rb"),
        ("MY_;touch x", "1"),
        ("MLFLOW_RUN", "`x`"),
        ("UCX_A", "$x"),
    ):
        with monkeypatch.context() as here:
            here.setenv(name, value)
            assert "cannot be sent to other hosts" in str(planned(here, str(config)))


def test_places_that_a_shell_would_take_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LaunchOptions(hostfile="h")
    pool = {"n1": 1, "n2": 1}
    with pytest.raises(UserError, match="the interpreter '/a b/python' cannot be reached over pdsh"):
        plan_job(options, Machine((), 4, "/a b/python"), "train.py", [], port=1, pool=pool)
    (tmp_path / "a;b").mkdir()
    monkeypatch.chdir(tmp_path / "a;b")
    with pytest.raises(UserError, match="the working folder"):
        plan_job(options, Machine((), 4, "/py"), "train.py", [], port=1, pool=pool)


def argv_of(job: Job) -> Sequence[str]:
    return runner_command(job) if job.route == "hosts" else job.command


@pytest.mark.parametrize("launcher", ["openmpi", "mpich", "slurm", "torchrun"])
def test_other_launchers_hand_arguments_on_without_a_shell(launcher: str, tmp_path: Path) -> None:
    value = hostile(tmp_path)["all"]
    options = LaunchOptions(hostfile="h", launcher=launcher, comment=value)
    job = plan_job(options, Machine((), 4, "/py"), "train.py", ["--set", f"name={value}"], port=1, pool={"n1": 1, "n2": 1})
    assert list(argv_of(job))[-3:] == ["train.py", "--set", f"name={value}"]
    assert launcher != "slurm" or f"--comment={value}" in argv_of(job)
