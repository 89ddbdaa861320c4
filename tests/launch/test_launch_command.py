"""deepy.py as GPT-NeoX's users type it: host files that are missing, plans of any mesh, help that lists every flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deepy
from megatron.errors import ConfigError, LaunchError
from megatron.launch.hosts import find_pool
from megatron.launch.job import Job
from megatron.launch.preview import runner_command

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "metala-quickstart.yml")
TRAIN = str(ROOT / "train.py")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been run."""
    jobs: list[Job] = []

    def run_job(job: Job) -> tuple[int, str]:
        jobs.append(job)
        return 0, ""

    monkeypatch.setattr(deepy, "run_job", run_job)
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)
    return jobs


def test_a_missing_host_file_is_a_warning_and_a_local_run(started: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert deepy.main([TRAIN, QUICK, "-H", "/mock_path"]) == 0
    assert [(job.route, job.processes) for job in started] == [("python", 1)]
    assert "warning: there is no host file /mock_path" in capsys.readouterr().err


def test_a_missing_host_file_names_no_hosts_to_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    words = [TRAIN, QUICK, "--launcher", "slurm", "--num_nodes", "2", "--num_gpus", "4", "-H", "/mock_path", "--print-launch"]
    assert deepy.main(words) == 0
    assert "--nodelist" not in capsys.readouterr().out


def test_a_missing_host_file_does_not_hide_that_hosts_are_needed(started: list[Job]) -> None:
    with pytest.raises(ConfigError, match="num_nodes 2 needs the names of the hosts"):
        deepy.main([TRAIN, QUICK, "-H", "/mock_path", "--num_nodes", "2"])
    assert not started


def test_host_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, usual = tmp_path / "hosts", tmp_path / "usual"
    path.write_text("a slots=2\n")
    usual.write_text("b slots=3\n")
    assert find_pool(str(path), (str(usual),)) == ({"a": 2}, "")
    assert find_pool(None, (None, str(tmp_path / "none"), str(usual))) == ({"b": 3}, "")
    assert find_pool(None, (None,)) == (None, "")
    pool, warning = find_pool(str(tmp_path / "none"), (str(usual),))
    assert pool is None and str(tmp_path / "none") in warning
    with pytest.raises(LaunchError, match="cannot read the host file"):
        find_pool(str(tmp_path))
    path.write_text("a slots=none\n")
    with pytest.raises(LaunchError, match="is not a line of a host file"):
        find_pool(str(path))
    path.write_text("localhost slots=2\n")
    monkeypatch.setenv("DLTS_HOSTFILE", str(path))  # GPT-NeoX's variable
    jobs: list[Job] = []
    monkeypatch.setattr(deepy, "run_job", lambda job: (jobs.append(job), (0, ""))[1])
    assert deepy.main([TRAIN, QUICK, "--set", "model_parallel_size=2"]) == 0
    assert [(job.route, job.processes) for job in jobs] == [("local", 2)]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "slurm"])
def test_all_hosts_are_told_one_free_port(
    launcher: str, tmp_path: Path, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepy, "addresses", lambda names: dict.fromkeys(names, "10.0.0.1"))
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    words = [TRAIN, QUICK, "-H", str(tmp_path / "hosts"), "--launcher", launcher, "--set", "train_batch_size=null"]
    for more in ([], [], ["--master_port", "29501"]):
        assert deepy.main([*words, *more]) == 0
    ports = []
    for job in started:
        text = " ".join((*runner_command(job), *(f"{name}={value}" for name, value in job.environment.items())))
        (port,) = set(re.findall(r"master_port[= ](\d+)", text, re.IGNORECASE))
        ports.append(port)
    assert ports[2] == "29501" and len(set(ports)) == 3 and "29500" not in ports


@pytest.mark.parametrize(
    ("words", "mesh"),
    [
        ("", "pipeline 1 x data 1 x tensor 1"),
        ("pipe_parallel_size=2 model_parallel_size=2", "pipeline 2 x data 1 x tensor 2"),
        ("pipe_parallel_size=2 global_num_gpus=8", "pipeline 2 x data 4 x tensor 1"),
        ("model_parallel_size=2 num_gpus=4 num_nodes=3", "pipeline 1 x data 6 x tensor 2"),
        ("model_parallel_size=2 global_num_gpus=4 hostfile=/mock_path", "pipeline 1 x data 2 x tensor 2"),
    ],
)
def test_a_plan_is_made_for_any_mesh_with_and_without_its_size(
    started: list[Job], words: str, mesh: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    small = ["num_layers=2", "attention_config=null", "pos_emb=none", "hidden_size=64", "seq_length=32", "mlp_type=regular"]
    small += ["padded_vocab_size=256", "intermediate_size=null", *words.split()]
    overrides = [part for item in small for part in ("--set", item)]
    if "hostfile" not in words and "num_nodes" in words:  # several hosts are planned for without being named
        overrides += ["--launcher", "slurm"]
    assert deepy.main([TRAIN, QUICK, "--dry-run", *overrides]) == 0
    assert [job.processes for job in started] == [1]
    assert train.main(list(started[0].command[3:])) == 0
    assert mesh in capsys.readouterr().out


def test_a_plan_needs_no_script(started: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    """`deepy.py CONFIG --dry-run`, as the documents say it; a start without a script is refused as before."""
    words = ["-d", str(ROOT / "configs"), "metala-quickstart", "--set", "train_iters=7"]
    assert deepy.main([*words, "--dry-run", "--mfu=0.3"]) == 0
    assert [job.command[2:] for job in started] == [(TRAIN, *words, "--dry-run", "--mfu=0.3")]
    with pytest.raises(SystemExit) as shown:
        deepy.main([*words, "--print-config"])
    assert shown.value.code == 0 and "train_iters: 7" in capsys.readouterr().out
    for more in ([], ["--print-launch"]):
        with pytest.raises(LaunchError, match=r"no such script: \(none given\)"):
            deepy.main([*words, *more])


def test_a_mesh_that_does_not_divide_is_refused(started: list[Job]) -> None:
    with pytest.raises(ConfigError, match="6 processes cannot be divided into pipe_parallel_size 4"):
        deepy.main([TRAIN, QUICK, "--dry-run", "--set", "pipe_parallel_size=4", "--set", "global_num_gpus=6"])
    assert not started


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", [TRAIN, QUICK]),
        ("eval.py", [str(ROOT / "eval.py")]),
        ("generate.py", [str(ROOT / "generate.py")]),
        ("train.py", []),
    ],
)
def test_help_lists_every_flag_of_the_command_and_of_the_script(
    script: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert deepy.main([*words, "--help"]) == 0
    found = capfd.readouterr().out
    text = (ROOT / script).read_text() + (ROOT / "deepy.py").read_text()
    flags = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))
    assert len(flags) >= 8 and flags <= set(re.findall(r"--[\w-]+", found)), flags


def test_help_runs_no_script_of_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "mine.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert deepy.main([str(script), "--help"]) == 0
    assert "--print-launch" in capsys.readouterr().out and not (tmp_path / "ran").exists()
