"""Compares the settings of a resumed run with those in its checkpoint, and selects its learning-rate schedule.

A checkpoint stores `record(run)` in its metadata. A resumed run compares it with its own: each change is logged once, with its
effect. The learning rate follows Megatron: the schedule must be the saved one, unless
`override_lr_scheduler` takes the config's or `use_checkpoint_lr_scheduler` the checkpoint's. A schedule whose length follows
`train_iters` remains the same schedule if `train_iters` changes, and the change is logged.
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

_STEPS = "the steps from here on differ from those of the saved run"
_TEXT = "the samples from here on differ: some text may be read twice or never"
# key -> effect of a new value on a resumed run
_EFFECTS: dict[str, str] = {
    "seed": f"the data order changes; {_TEXT}",
    "seq_length": f"the length of samples changes; {_TEXT}",
    "train_batch_size": "the number of samples per step changes; the data continue where they stopped",
    "train_iters": "the run ends at another step",
    "pack_impl": f"the packing of samples changes; {_TEXT}",
    "split": f"the training split of the corpus changes; {_TEXT}",
    "optimizer.type": _STEPS,
    "optimizer.params.betas": _STEPS,
    "optimizer.params.eps": _STEPS,
    "weight_decay": _STEPS,
    "weight_decay_rule": _STEPS,
    "gradient_clipping": _STEPS,
    "precision": _STEPS,
    "hidden_dropout": _STEPS,
    "attention_dropout": _STEPS,
    "objective": f"the loss changes; {_STEPS}",
    "loss_mean_over": f"the loss changes; {_STEPS}",
    "eod_mask_loss": f"the loss changes; {_STEPS}",
    "reset_state_at_eod": "the visible context of tokens changes",
}
_CURVE = {
    "lr": "optimizer.params.lr",
    "style": "lr_decay_style",
    "min_lr": "min_lr",
    "warmup": "warmup",
    "warmup_start": "warmup_start_lr",
    "horizon": "lr_decay_iters",
}
"""Field of `ScheduleConfig` -> configuration key."""


def record(run: RunConfig, curve: ScheduleConfig | None = None, horizon_from: str | None = None) -> dict[str, Any]:
    """The settings of a run as JSON types, for `resumed`.

    Args:
        run: the configuration.
        curve: its schedule, if it is not the config's.
        horizon_from: see `_horizon_from`.
    """
    values = {key: run.get(key) for key in _EFFECTS if "." not in key}
    optimizer = run.optimizer
    optimizer_values = {"type": optimizer.optimizer_type, "params.betas": list(optimizer.betas), "params.eps": optimizer.eps}
    return {
        "values": values | {f"optimizer.{key}": value for key, value in optimizer_values.items()},
        "schedule": asdict(curve or schedule_config(run)),
        "horizon_from": horizon_from or _horizon_from(run),
    }


def _horizon_from(run: RunConfig) -> str:
    """The key that determines the length of the schedule."""
    s = run.schedule
    if s.lr_decay_iters is not None:
        return "lr_decay_iters"
    return "train_iters" if s.lr_decay_fraction is None else f"{s.lr_decay_fraction} of train_iters"


@dataclass(frozen=True)
class Continued:
    """The schedule and metadata of a run.

    Attributes:
        schedule: applied steps -> learning rate of the next step.
        facts: metadata that its checkpoints store.
        lines: changed settings, for the console.
    """

    schedule: Callable[[int], float]
    facts: dict[str, Any]
    lines: tuple[str, ...] = ()


def _origin(run: RunConfig) -> dict[str, str]:
    return origin(run.checkpoint.load, run.checkpoint.save, run.checkpoint.finetune)


def started(run: RunConfig) -> Continued:
    """A new run."""
    return Continued(schedule_of(run), {"settings": record(run), **_origin(run)})


def resumed(run: RunConfig, facts: Mapping[str, Any], step: int, name: str) -> Continued:
    """A run resumed from a checkpoint.

    Args:
        run: the configuration.
        facts: metadata of the manifest.
        step: applied steps.
        name: name of the checkpoint, for messages.

    Raises:
        CheckpointError: its schedule differs from the config's, and no key selects one of them.
    """
    saved, settings = _saved(facts), record(run)
    lines = [
        f"{key}: {_text(saved['values'][key])} -> {_text(value)}; {_EFFECTS[key]}"
        for key, value in settings["values"].items()
        if key in saved["values"] and saved["values"][key] != value
    ]
    curve, saved_curve = schedule_config(run), _curve_of(saved)
    if saved_curve is not None:
        lines += _schedule_lines(run, saved, settings, step, name)
        if run.schedule.use_checkpoint_lr_scheduler:
            curve, settings = saved_curve, record(run, saved_curve, saved.get("horizon_from"))
    elif run.schedule.use_checkpoint_lr_scheduler:
        lines.append("learning rate: the checkpoint has no schedule; using the config's")
    head = (f"warning: this run resumes from {name} with other settings:", *(f"  {line}" for line in lines))
    started_from = {key: value for key, value in facts.items() if key == STARTED_FROM}
    checkpoint_facts = {"settings": settings, **_origin(run), **started_from}
    return Continued(lambda n: learning_rate(n, curve), checkpoint_facts, head if lines else ())


def _saved(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint; for one of an older release, the few settings that it stores."""
    record_ = facts.get("settings")
    if isinstance(record_, dict) and isinstance(record_.get("values"), dict):
        return record_
    run_facts = facts.get("run")
    run = run_facts if isinstance(run_facts, dict) else {}
    values = {"seed": run.get("seed"), "train_batch_size": run.get("global batch"), "weight_decay": run.get("weight decay")}
    values |= {"precision": run.get("precision"), "seq_length": facts.get("seq_length")}
    return {"values": {key: value for key, value in values.items() if value is not None}}


def _curve_of(saved: Mapping[str, Any]) -> ScheduleConfig | None:
    try:
        return ScheduleConfig(**saved["schedule"])
    except (KeyError, TypeError):
        return None  # of an older or a later release


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "unset" if value is None else str(value)


def _schedule_lines(run: RunConfig, saved: Mapping[str, Any], own: Mapping[str, Any], step: int, name: str) -> list[str]:
    """The differences between the saved schedule and the config's, and which of them applies.

    Raises:
        CheckpointError: see `resumed`.
    """
    saved_curve, own_curve = saved["schedule"], own["schedule"]
    follows = saved.get("horizon_from") == own["horizon_from"] != "lr_decay_iters"
    changed = [
        field
        for field in _CURVE
        if saved_curve.get(field) != own_curve[field] and not _has_no_effect(field, saved_curve, own_curve)
    ]
    if not changed:
        return []
    saved_rate, own_rate = (learning_rate(step, ScheduleConfig(**curve)) for curve in (saved_curve, own_curve))
    if run.schedule.use_checkpoint_lr_scheduler:
        texts = [f"{_CURVE[field]} {_text(saved_curve[field])}, not {_text(own_curve[field])}" for field in changed]
        return [
            f"learning rate: using the checkpoint's schedule ({', '.join(texts)}): next {saved_rate:.4g}, not {own_rate:.4g}"
        ]
    texts = [f"{_CURVE[field]} {_text(saved_curve[field])} -> {_text(own_curve[field])}" for field in changed]
    if (changed != ["horizon"] or not follows) and not run.schedule.override_lr_scheduler:
        raise CheckpointError(
            "the learning-rate schedule is not that of the checkpoint",
            where=name,
            why=", ".join(texts),
            hint="override_lr_scheduler: true takes the config's, use_checkpoint_lr_scheduler: true the checkpoint's",
        )
    return [f"learning rate: {', '.join(texts)}: next {own_rate:.4g} instead of {saved_rate:.4g}"]


def _has_no_effect(field: str, saved_curve: Mapping[str, Any], own_curve: Mapping[str, Any]) -> bool:
    """Whether a field has no effect in either schedule: a constant rate has neither end nor minimum."""
    constant = saved_curve.get("style") == own_curve["style"] == "constant"
    if field == "horizon":
        return constant and not saved_curve.get("warmup") and not own_curve["warmup"]
    return field == "min_lr" and constant
