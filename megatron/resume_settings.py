"""What a run that goes on must say, and take over, of the run that saved its checkpoint: its settings and its learning rate.

A checkpoint keeps `record(run)` among its facts. A resumed run compares it with its own: what changed is listed once, with what
it does. The learning rate is Megatron's matter of three: the schedule must be the one that was saved, unless
`override_lr_scheduler` takes the config's or `use_checkpoint_lr_scheduler` the checkpoint's. A schedule that follows
`train_iters` as before is the same schedule: another `train_iters` moves it, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron.checkpoint.resume import STARTED_FROM, origin
from megatron.config.schema import RunConfig
from megatron.engine.schedule import ScheduleConfig, learning_rate
from megatron.errors import CheckpointError
from megatron.settings import schedule_config, schedule_of

_STEPS = "the steps from here on are other ones than those of the run before"
_TEXT = "the samples from here on are other ones: text of the data may be read twice or never"
# key -> what another value does to a run that goes on
_EFFECTS: dict[str, str] = {
    "seed": f"the order of the data is another one; {_TEXT}",
    "seq_length": f"a sample is of another length; {_TEXT}",
    "train_batch_size": "a step reads another number of samples; the data go on where they stopped",
    "train_iters": "the run ends at another step",
    "pack_impl": f"samples are cut otherwise; {_TEXT}",
    "split": f"training reads another part of the corpus; {_TEXT}",
    "optimizer.type": _STEPS,
    "optimizer.params.betas": _STEPS,
    "optimizer.params.eps": _STEPS,
    "weight_decay": _STEPS,
    "weight_decay_rule": _STEPS,
    "gradient_clipping": _STEPS,
    "precision": _STEPS,
    "hidden_dropout": _STEPS,
    "attention_dropout": _STEPS,
    "objective": f"the loss is another one; {_STEPS}",
    "loss_mean_over": f"the loss is another one; {_STEPS}",
    "eod_mask_loss": f"the loss is another one; {_STEPS}",
    "reset_state_at_eod": "tokens see other tokens before them",
}
_CURVE = {
    "lr": "optimizer.params.lr",
    "style": "lr_decay_style",
    "min_lr": "min_lr",
    "warmup": "warmup",
    "warmup_start": "warmup_start_lr",
    "horizon": "lr_decay_iters",
}
"""Field of `ScheduleConfig` -> the key that says it."""


def record(run: RunConfig, curve: ScheduleConfig | None = None, horizon_from: str | None = None) -> dict[str, Any]:
    """The settings of a run as JSON types: what `resumed` compares. curve: its schedule where that is not the config's."""
    values = {key: run.get(key) for key in _EFFECTS if "." not in key}
    optimizer = run.optimizer
    own = {"type": optimizer.optimizer_type, "params.betas": list(optimizer.betas), "params.eps": optimizer.eps}
    return {
        "values": values | {f"optimizer.{key}": value for key, value in own.items()},
        "schedule": asdict(curve or schedule_config(run)),
        "horizon_from": horizon_from or _horizon_from(run),
    }


def _horizon_from(run: RunConfig) -> str:
    """What the length of the schedule follows from."""
    s = run.schedule
    if s.lr_decay_iters is not None:
        return "lr_decay_iters"
    return "train_iters" if s.lr_decay_fraction is None else f"{s.lr_decay_fraction} of train_iters"


@dataclass(frozen=True)
class Continued:
    """How a run goes on.

    schedule: steps applied so far -> learning rate of the next. facts: what its checkpoints keep for the next start.
    lines: what changed, for the console.
    """

    schedule: Callable[[int], float]
    facts: dict[str, Any]
    lines: tuple[str, ...] = ()


def _origin(run: RunConfig) -> dict[str, str]:
    return origin(run.checkpoint.load, run.checkpoint.save, run.checkpoint.finetune)


def started(run: RunConfig) -> Continued:
    """A run from its first step on: nothing to compare."""
    return Continued(schedule_of(run), {"settings": record(run), **_origin(run)})


def resumed(run: RunConfig, facts: Mapping[str, Any], step: int, name: str) -> Continued:
    """A run that goes on from a checkpoint.

    Args:
        facts: those of its manifest. step: steps applied so far. name: of the checkpoint, for messages.

    Raises:
        CheckpointError: its schedule is not that of the config, and no key says which of them holds.
    """
    saved, own = _saved(facts), record(run)
    lines = [
        f"{key}: {_text(saved['values'][key])} -> {_text(value)}; {_EFFECTS[key]}"
        for key, value in own["values"].items()
        if key in saved["values"] and saved["values"][key] != value
    ]
    curve, theirs = schedule_config(run), _curve_of(saved)
    if theirs is not None:
        lines += _schedule_lines(run, saved, own, step, name)
        if run.schedule.use_checkpoint_lr_scheduler:
            curve, own = theirs, record(run, theirs, saved.get("horizon_from"))
    elif run.schedule.use_checkpoint_lr_scheduler:
        lines.append("learning rate: the checkpoint does not say its schedule; the config's holds")
    head = (f"warning: this run goes on from {name} with other settings:", *(f"  {line}" for line in lines))
    started_from = {key: value for key, value in facts.items() if key == STARTED_FROM}
    kept = {"settings": own, **_origin(run), **started_from}
    return Continued(lambda n: learning_rate(n, curve), kept, head if lines else ())


def _saved(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint; of one that an older release wrote, the few settings that it kept."""
    found = facts.get("settings")
    if isinstance(found, dict) and isinstance(found.get("values"), dict):
        return found
    told = facts.get("run")
    run = told if isinstance(told, dict) else {}
    kept = {"seed": run.get("seed"), "train_batch_size": run.get("global batch"), "weight_decay": run.get("weight decay")}
    kept |= {"precision": run.get("precision"), "seq_length": facts.get("seq_length")}
    return {"values": {key: value for key, value in kept.items() if value is not None}}


def _curve_of(saved: Mapping[str, Any]) -> ScheduleConfig | None:
    try:
        return ScheduleConfig(**saved["schedule"])
    except (KeyError, TypeError):
        return None  # of an older or a later release


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "unset" if value is None else str(value)


def _schedule_lines(run: RunConfig, saved: Mapping[str, Any], own: Mapping[str, Any], step: int, name: str) -> list[str]:
    """What is different between the saved schedule and the config's, and which of them holds.

    Raises:
        CheckpointError: see `resumed`.
    """
    theirs, mine = saved["schedule"], own["schedule"]
    follows = saved.get("horizon_from") == own["horizon_from"] != "lr_decay_iters"
    changed = [field for field in _CURVE if theirs.get(field) != mine[field] and not _idle(field, theirs, mine)]
    if not changed:
        return []
    then, now = (learning_rate(step, ScheduleConfig(**curve)) for curve in (theirs, mine))
    if run.schedule.use_checkpoint_lr_scheduler:
        texts = [f"{_CURVE[field]} {_text(theirs[field])}, not {_text(mine[field])}" for field in changed]
        return [f"learning rate: the checkpoint's schedule holds ({', '.join(texts)}): next {then:.4g}, not {now:.4g}"]
    texts = [f"{_CURVE[field]} {_text(theirs[field])} -> {_text(mine[field])}" for field in changed]
    if (changed != ["horizon"] or not follows) and not run.schedule.override_lr_scheduler:
        raise CheckpointError(
            "the learning-rate schedule is not that of the checkpoint",
            where=name,
            why=", ".join(texts),
            hint="override_lr_scheduler: true takes the config's, use_checkpoint_lr_scheduler: true the checkpoint's",
        )
    return [f"learning rate: {', '.join(texts)}: next {now:.4g} instead of {then:.4g}"]


def _idle(field: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Has a field no effect in either curve? A constant rate has neither an end nor a floor."""
    constant = theirs.get("style") == mine["style"] == "constant"
    if field == "horizon":
        return constant and not theirs.get("warmup") and not mine["warmup"]
    return field == "min_lr" and constant
