"""The generated page and schema are fresh, `--explain` and `--print-config` tell the truth, flags reach the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron.config import explain as explain_module
from megatron.config import pages
from megatron.config.catalog import catalog
from megatron.config.cli import config_from_args, make_parser
from megatron.config.explain import explain, print_config
from megatron.config.load import load_config
from megatron.config.pages import arguments_page, schema
from megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
QUICK = str(ROOT / "configs" / "metala-quickstart.yml")
STALE = "run: python -m megatron.config.explain"


def test_page_is_fresh() -> None:
    assert (ROOT / "configs" / "arguments.md").read_text(encoding="utf-8") == arguments_page(), STALE


def test_schema_is_fresh() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8")) == schema(), STALE


def test_writing_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for folder in ("configs", "docs"):
        (tmp_path / folder).mkdir()
    explain_module.main()
    for name in ("configs/arguments.md", "configs/schema.json", "docs/neox.md", "docs/keys.md"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), STALE


def test_every_key_is_on_the_page_and_in_the_schema() -> None:
    page, properties = arguments_page(), schema()["properties"]
    for key in catalog():
        assert f"| `{key}` |" in page, key
        assert key in properties


def test_explain_one_key() -> None:
    text = explain("warmup", load_config([QUICK]))
    assert "share of the horizon" in text and "metala-quickstart.yml:" in text and "default: 0.01" in text
    assert "alias of optimizer.params.lr" in explain("lr")
    assert "not rpe" in explain("pos-emb")
    assert "refused" in explain("moe_num_experts", load_config([QUICK]))
    with pytest.raises(ConfigError, match="there is no key warmpu"):
        explain("warmpu")


def test_printed_config_reads_back(tmp_path: Path) -> None:
    run = load_config([QUICK], world_size=2, overrides={"optimizer.params.lr": "3e-3"})
    text = print_config(run)
    assert "# derived: " in text and "params.lr: --set" in text
    assert yaml.safe_load(text) == run.flat()
    (tmp_path / "metala-quickstart.yml").write_text(text)
    assert load_config([tmp_path / "metala-quickstart.yml"], world_size=2).flat() == run.flat()


def test_flags_and_set() -> None:
    argv = ["-d", str(ROOT / "configs"), "metala-quickstart", "-H", "hosts", "--iteration", "7", "--wandb-group", "g"]
    ns = make_parser("test").parse_args([*argv, "--set", "train_iters=5", "--set", "iteration=8"])
    run = config_from_args(ns, 2)
    assert (run.launch.hostfile, run.checkpoint.iteration, run.logging.wandb_group) == ("hosts", 8, "g")
    assert run.training.train_iters == 5 and run.batch.train_batch_size == 16
    assert run.provenance["hostfile"] == "--hostfile" and run.provenance["iteration"] == "--set"


def test_flags_of_deepspeeds_launcher() -> None:
    argv = [QUICK, "--launcher", "openmpi", "--num_gpus", "2", "--num-nodes", "3", "--include", "a@b:0", "--launcher_args=-x A"]
    launch = config_from_args(make_parser("test").parse_args(argv), check=False).launch
    assert (launch.launcher, launch.num_gpus, launch.num_nodes, launch.include) == ("openmpi", 2, 3, "a@b:0")
    assert launch.launcher_args == "-x A"


def test_print_and_explain_stop(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("test")
    for argv, words in (([QUICK, "--print-config"], "num_layers: 4"), (["--explain", "seed"], "Seed of weights")):
        with pytest.raises(SystemExit) as caught:
            config_from_args(parser.parse_args(argv))
        assert caught.value.code == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("split=a, b, c", "split 'a, b, c' cannot be read"),
        ("moe_num_experts=8", "moe_num_experts: 8 is not supported"),
        ("warmup=2.0", "warmup 2.0 leaves no steps"),
        ("model_parallel_size=3", "is not a multiple of model_parallel_size 3"),
        ("global_num_gpus=3", "train_batch_size"),
    ],
)
def test_what_a_plan_refuses_is_shown_and_refused(setting: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--print-config` and `--dry-run` agree on what a valid configuration is; the first shows what was read all the same."""
    import train

    words_of = [QUICK, "--set", "train_batch_size=16", "--set", "train_micro_batch_size_per_gpu=16", "--set", setting]
    found = []
    for flag in ("--print-config", "--dry-run"):
        with pytest.raises(ConfigError, match=words) as caught:
            train.main([*words_of, flag])
        found.append(str(caught.value))
    assert found[0] == found[1]
    if "global_num_gpus" not in setting:  # from batch sizes that do not multiply out no others can be derived
        assert "num_layers: 4" in capsys.readouterr().out


def test_a_mesh_is_shown_without_its_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody has started the ranks of a configuration that is printed; scripts that read old files print what they read."""
    import train

    with pytest.raises(SystemExit) as caught:
        train.main([QUICK, "--set", "model_parallel_size=2", "--print-config"])
    assert caught.value.code == 0 and "world_size" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        config_from_args(make_parser("test").parse_args([QUICK, "--set", "split=x", "--print-config"]), check=False)
    assert caught.value.code == 0


def test_set_needs_an_equals_sign_and_flags_are_not_shortened() -> None:
    parser = make_parser("test")
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        config_from_args(parser.parse_args([QUICK, "--set", "train_iters"]))
    with pytest.raises(SystemExit):
        parser.parse_args([QUICK, "--wandb_run", "x"])
