"""Keys of tokenizer, checkpoint, logging, launch, generation, evaluation, reliability: looked for in what the commands call."""

from __future__ import annotations

from typing import Any
from unittest import mock

from megatron import resume_settings, settings
from tests.arrival.arrivals import Arrival
from tests.arrival.case import Case
from tests.arrival.run_keys import EMBEDDING, SAVING, call

LOADING = {**SAVING, "load": "run/checkpoints"}
HOSTS = {"hostfile": "hosts"}
SLURM = {"launcher": "slurm", "num_nodes": 2, "num_gpus": 2}
PERPLEXITY = {"eval_tasks": ["perplexity"], "data_path": "corpus", "eval_lengths": [24]}
WRITING = {"load": "run/checkpoints"}
PROMPTS = {"text_gen_type": "input-file", "sample_input_file": "prompts.txt"}


def _tokenizer(position: int) -> Any:
    """An argument of the tokenizer that a start opens; the files of the tables are never read."""

    def look(case: Case) -> Any:
        with mock.patch.object(settings, "build_tokenizer") as opened:
            settings.tokenizer_of(case.run)
        return opened.call_args.args[position]

    return look


def _save(name: str) -> Any:
    return lambda case: case.save[name]


def _rule(name: str) -> Any:
    return lambda case: getattr(case.fit["options"].save_rule, name)


def _guard(name: str) -> Any:
    return lambda case: getattr(case.fit["options"].guard, name)


def _wandb(name: str) -> Any:
    """A field of what W&B is opened with; None without it."""
    return lambda case: getattr(case.call("sinks")["options"].wandb, name, None)


def _resumed_rate(case: Case) -> float:
    """The last step's rate of a run that resumes from a checkpoint whose rate was constant, 0.01; its own falls to 0."""
    theirs = case.run.model_copy(update={"schedule": case.run.schedule.model_copy(update={"lr_decay_style": "constant"})})
    facts = {"settings": resume_settings.record(theirs)}
    return resume_settings.resumed(case.run, facts, 3, "a checkpoint").schedule(10)


def _reporting(case: Case) -> Any:
    """The hook that logs."""
    return case.fit["hooks"][-1]


def _words(name: str) -> Any:
    """Does the job's command hold this word?"""
    return lambda case: any(name in word for word in case.job.command)


def _sampling(name: str) -> Any:
    return lambda case: getattr(case.writer.sampling, name)


def _text(name: str) -> Any:
    return lambda case: case.text.get(name)


def _options(name: str) -> Any:
    return lambda case: getattr(case.measured[0], name)


def _request(name: str) -> Any:
    return lambda case: getattr(case.measured[1], name)


def _slots(case: Case) -> dict[str, list[int]]:
    return {host: list(slots) for host, slots in case.job.hosts.items()}


TOKENIZER: dict[str, Arrival] = {
    "tokenizer_type": Arrival("SPMTokenizer", _tokenizer(0)),
    "vocab_file": Arrival("words.json", _tokenizer(1)),
    "merge_file": Arrival("merges.txt", _tokenizer(2)),
    "padded_vocab_size": Arrival(640, lambda c: c.weight(EMBEDDING).shape[0]),
}

CHECKPOINT: dict[str, Arrival] = {
    "save": Arrival("elsewhere", lambda c: [c.save["folder"], c.rewind["folder"]], ["elsewhere"] * 2, SAVING),
    "load": Arrival("elsewhere", lambda c: c.fit and c.calls.of.get("resume", {}).get("load_dir")),
    "checkpoint_factor": Arrival(3, _rule("factor"), beside=SAVING),
    "checkpoint_scale": Arrival("log", _rule("scale"), beside=SAVING),
    "extra_save_iters": Arrival([3, 5], lambda c: [sorted(_rule("extra")(c)), list(c.save["keep"])], [[3, 5]] * 2, SAVING),
    "keep_last_n_checkpoints": Arrival(4, _save("keep_last"), beside=SAVING),
    "iteration": Arrival(7, call("resume", "iteration"), beside=LOADING),
    "finetune": Arrival(True, call("resume", "finetune"), beside=LOADING),
    "no_load_optim": Arrival(True, call("resume", "load_optimizer"), False, LOADING),
    "no_load_rng": Arrival(True, call("resume", "load_rng"), False, LOADING),
    "no_save_optim": Arrival(True, _save("save_optimizer"), False, SAVING),
    "no_save_rng": Arrival(True, _save("save_rng"), False, SAVING),
    "async_save": Arrival(True, lambda c: c.fit["actions"].poll_saves.__self__.background),
    "verify_checkpoint": Arrival(False, lambda c: [c.call("resume")["verify"], c.rewind["verify"]], [False, False], LOADING),
}

RESUME: dict[str, Arrival] = {
    "override_lr_scheduler": Arrival(True, _resumed_rate, 0.0),
    "use_checkpoint_lr_scheduler": Arrival(True, _resumed_rate, 0.01),
}

LOGGING: dict[str, Arrival] = {
    "run_dir": Arrival("elsewhere", lambda c: str(c.call("folder")["root"])),
    "log_interval": Arrival(3, lambda c: _reporting(c).log_interval),
    "log_dir": Arrival("logs", lambda c: str(c.call("sinks")["options"].metrics_file), "logs/metrics.jsonl"),
    "tensorboard_dir": Arrival("board", lambda c: c.call("sinks")["options"].tensorboard_dir),
    "use_wandb": Arrival(True, lambda c: c.call("sinks")["options"].wandb is not None),
    **{
        f"wandb_{key}": Arrival(value, _wandb(name), beside={"use_wandb": True})
        for key, name, value in (
            ("group", "group", "G"),
            ("run_name", "name", "N"),
            ("team", "team", "T"),
            ("project", "project", "P"),
            ("host", "host", "https://wandb.example"),
            ("mode", "mode", "offline"),
        )
    },
    "peak_theoretical_tflops": Arrival(99.0, lambda c: [_reporting(c).cost.peak_tflops, c.limits["tflops"]], [99.0, 99.0]),
}

LAUNCH: dict[str, Arrival] = {
    "hostfile": Arrival("hosts", _slots, {"alpha": [0, 1], "beta": [0, 1], "gamma": [0, 1]}),
    "include": Arrival("beta:1", _slots, {"beta": [1]}, HOSTS),
    "exclude": Arrival("alpha@beta", _slots, {"gamma": [0, 1]}, HOSTS),
    "num_nodes": Arrival(1, _slots, {"alpha": [0, 1]}, HOSTS),
    "num_gpus": Arrival(1, _slots, {"alpha": [0], "beta": [0], "gamma": [0]}, HOSTS),
    "master_addr": Arrival("10.9.8.7", _words("--master_addr=10.9.8.7"), True, HOSTS),
    "master_port": Arrival(12345, _words("--master_port=12345"), True, HOSTS),
    "launcher": Arrival("torchrun", lambda c: c.job.launcher, beside=HOSTS | {"num_nodes": 1}),
    "launcher_args": Arrival("--overlap", _words("--overlap"), True, SLURM),
    "export_env": Arrival(["MY_*"], lambda c: any("MY_SETTING=seen" in text for text in c.job.files.values()), True, HOSTS),
    "deepspeed_mpi": Arrival(True, lambda c: c.job.launcher, "openmpi", HOSTS),
    "deepspeed_slurm": Arrival(True, lambda c: c.job.launcher, "slurm", HOSTS),
    "force_multi": Arrival(True, lambda c: c.job.route, "hosts"),
    "no_ssh_check": Arrival(True, lambda c: (c.job, c.calls.of["reach"]["names"])[1], ["alpha"], HOSTS),
    "comment": Arrival("mine", _words("--comment=mine"), True, SLURM),
    "account": Arrival("ours", _words("--account=ours"), True, SLURM),
    "global_num_gpus": Arrival(4, lambda c: [c.plan.world_size, c.plan.batch.train_batch_size], [4, 8]),
}

GENERATION: dict[str, Arrival] = {
    "text_gen_type": Arrival("interactive", _text("kind")),
    "temperature": Arrival(0.5, _sampling("temperature"), beside=WRITING),
    "top_p": Arrival(0.9, _sampling("top_p"), beside=WRITING),
    "top_k": Arrival(3, _sampling("top_k"), beside=WRITING),
    "maximum_tokens": Arrival(5, _sampling("maximum_tokens"), beside=WRITING),
    "prompt_end": Arrival("##", _text("end"), beside=PROMPTS),
    "sample_input_file": Arrival("others.txt", _text("source"), beside=PROMPTS),
    "sample_output_file": Arrival("out.jsonl", _text("output"), beside=PROMPTS),
    "num_samples": Arrival(3, _text("given")),
    "prompt_mode": Arrival(
        "read_twice", lambda c: [c.writer.sampling.prompt_mode, c.measured[0].prefix.mode], ["read_twice"] * 2,
        {"eval_tasks": ["piqa"], **WRITING},
    ),
    "recompute": Arrival(True, _sampling("recompute"), beside=WRITING),
    "return_logits": Arrival(True, _sampling("return_logits"), beside=WRITING),
}  # fmt: skip

EVALUATION: dict[str, Arrival] = {
    "eval_tasks": Arrival(["piqa", "boolq"], _request("tasks"), ("piqa", "boolq"), {"eval_tasks": ["wic"]}),
    "eval_results_prefix": Arrival("out/mine", lambda c: c.perplexity["output"][:19], "out/mine_perplexity", PERPLEXITY),
    "eval_lengths": Arrival([8, 16], lambda c: [s[0] for s in c.perplexity["scored"]], beside=PERPLEXITY),
    "eval_stride": Arrival(6, lambda c: c.perplexity["scored"][0][1], beside=PERPLEXITY),
    "eval_split": Arrival(
        "test", lambda c: c.perplexity["output"].partition("_")[2][:15], "perplexity_test", PERPLEXITY | {"split": "80, 10, 10"}
    ),
    "eval_limit": Arrival(11, lambda c: [c.perplexity["tokens"], c.measured[1].limit], [11, 11], PERPLEXITY),
    "eval_depths": Arrival([0.25, 1], lambda c: c.needles["plan"].depths, (0.25, 1.0), {"eval_tasks": ["niah"]}),
    "eval_text": Arrival("essays.txt", lambda c: c.needles["text"], beside={"eval_tasks": ["niah"]}),
    "eval_batch_size": Arrival(3, _options("batch_size"), beside={"eval_tasks": ["piqa"]}),
    "eval_max_length": Arrival(77, _options("max_length"), beside={"eval_tasks": ["piqa"]}),
    "eval_num_fewshot": Arrival(2, _request("num_fewshot"), beside={"eval_tasks": ["piqa"]}),
    "eval_data_dir": Arrival("sets", lambda c: getattr(c.measured[1].data_dir, "name", None), beside={"eval_tasks": ["piqa"]}),
    "eval_context_length": Arrival(9, lambda c: c.measured[1].metadata["context_length"], beside={"eval_tasks": ["piqa"]}),
    "eval_prefix_scope": Arrival("whole", lambda c: c.measured[0].prefix.scope, beside={"eval_tasks": ["piqa"]}),
    "eval_stop_at_eod": Arrival(False, _options("stop_at_eod"), beside={"eval_tasks": ["piqa"]}),
}

RELIABILITY: dict[str, Arrival] = {
    "time_limit": Arrival("2:00", lambda c: c.fit["control"]._limit._limit_s, 120.0),
    "exit_signals": Arrival(["SIGUSR2"], lambda c: c.fit["control"]._signals.numbers, (12,)),
    "skip_budget": Arrival(4, _guard("budget")),
    "skip_window": Arrival(70, _guard("window")),
    "on_skip_budget": Arrival("rewind", _guard("on_budget"), beside=SAVING),
    "spike_sigma": Arrival(5.0, _guard("spike_sigma")),
    "spike_window": Arrival(32, _guard("spike_window")),
    "hang_timeout": Arrival(60.0, lambda c: c.fit and c.calls.of.get("watchdog", {}).get("timeout_s")),
}


TABLES = (TOKENIZER, CHECKPOINT, RESUME, LOGGING, LAUNCH, GENERATION, EVALUATION, RELIABILITY)
