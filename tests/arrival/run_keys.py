"""Keys of mesh, optimizer, schedule, batch, precision, training and data: looked for in the parts of a start."""

from __future__ import annotations

from typing import Any

import torch

from megatron.engine.deepspeed_config import deepspeed_config
from megatron.parallel.mesh import Mesh
from tests.arrival.arrivals import Arrival
from tests.arrival.case import Case

EMBEDDING = "model.embed_tokens.weight"
LISTS = {
    "data_path": None,
    "train_data_paths": ["second", "third"],
    "valid_data_paths": ["third"],
    "test_data_paths": ["third"],
}
STREAMS = {"data_path": None, "train_stream": ["text.jsonl"]}
SAVING = {"save": "run/checkpoints", "checkpoint_factor": 2}
JRT = {"objective": "jrt", "objective_prefix_length": 8}


def _setting(name: str) -> Any:
    """A field of what the engine was built with."""
    return lambda case: getattr(case.call("engine")["settings"], name)


def _objective(name: str) -> Any:
    return lambda case: getattr(case.engine.settings.objective, name)


def _group(name: str) -> Any:
    """A field of the optimizer's group that decays."""
    return lambda case: max(case.engine.optimizer.param_groups, key=lambda g: g["weight_decay"])[name]


def _clipped(case: Case) -> list[float]:
    """The norm of clipped gradients of ones, and the setting of DeepSpeed."""
    for tensor in case.engine.parameters().values():
        tensor.grad = torch.ones_like(tensor)
    case.engine._clip(float(case.engine._norm()))
    limit = deepspeed_config(case.engine.settings, Mesh.single(), True, 1)["gradient_clipping"]
    return [round(float(case.engine._norm()), 3), limit]


def _rate(step: int) -> Any:
    """The learning rate after `step` steps."""
    return lambda case: case.fit["schedule"](step)


def option(name: str) -> Any:
    """A field of the loop's options."""
    return lambda case: getattr(case.fit["options"], name)


def call(name: str, argument: str) -> Any:
    """An argument of a call that is watched."""
    return lambda case: case.call(name)[argument]


def _zero(case: Case) -> list[int]:
    settings = case.engine.settings
    return [settings.zero_stage, deepspeed_config(settings, Mesh.single(), True, 1)["zero_optimization"]["stage"]]


def _decays(case: Case) -> bool:
    """Is the embedding in a group that decays?"""
    held = case.engine.parameters()[EMBEDDING]
    return any(any(p is held for p in g["params"]) and g["weight_decay"] > 0 for g in case.engine.optimizer.param_groups)


def _accumulates_in_fp32(case: Case) -> bool:
    return "data_types" in deepspeed_config(case.engine.settings, Mesh.single(), True, 1)


def _masking(case: Case) -> Any:
    """What hides tokens of the training batches."""
    return case.fit["batches"].__reduce__()[1][0].__self__


def _train_set(case: Case) -> Any:
    return case.call("batches")["dataset"]


PARALLEL: dict[str, Arrival] = {
    "pipe_parallel_size": Arrival(2, lambda c: c.mesh["pp"]),
    "model_parallel_size": Arrival(2, lambda c: c.mesh["tp"]),
    "sequence_parallel": Arrival(True, _setting("sequence_parallel")),
    "context_parallel_size": Arrival(2, lambda c: c.mesh["cp"]),
    "context_parallel_exchange": Arrival("scan", _setting("context_parallel_exchange")),
    "zero_optimization": Arrival({"stage": 2}, _zero, [2, 2]),
    "pipe_partition_method": Arrival("uniform", _setting("partition_method")),
    "distributed_backend": Arrival("gloo", call("connect", "backend")),
    "engine": Arrival("single", call("engine", "kind")),
}

OPTIMIZER: dict[str, Arrival] = {
    "optimizer": Arrival(
        {"type": "AdamW", "params": {"lr": 0.02, "betas": [0.7, 0.8], "eps": 1e-6}},
        lambda c: [c.fit["schedule"](1), _group("betas")(c), _group("eps")(c)],
        [0.018, [0.7, 0.8], 1e-6],
        {"warmup": 0.0},
    ),
    "weight_decay": Arrival(0.25, _group("weight_decay")),
    "weight_decay_rule": Arrival("based", _decays, False),
    "gradient_clipping": Arrival(0.25, _clipped, [0.25, 0.25]),
    "fp32_allreduce": Arrival(True, _setting("fp32_allreduce")),
}

# lr 0.01 over 10 steps, linear.
SCHEDULE: dict[str, Arrival] = {
    "lr_decay_style": Arrival("constant", _rate(10), 0.01),
    "lr_decay_iters": Arrival(5, _rate(5), 0.0, {"warmup": 0.0}),
    "lr_decay_fraction": Arrival(0.5, _rate(5), 0.0, {"warmup": 0.0}),
    "min_lr": Arrival(0.002, _rate(10), 0.002),
    "warmup": Arrival(0.5, _rate(1), 0.002),
    "warmup_start_lr": Arrival(0.004, _rate(0), 0.004, {"warmup": 0.5}),
}

BATCH: dict[str, Arrival] = {
    "train_batch_size": Arrival(6, option("samples_per_step")),
    "train_micro_batch_size_per_gpu": Arrival(3, lambda c: c.batch.tokens.shape[0]),
    "gradient_accumulation_steps": Arrival(3, _setting("gradient_accumulation")),
}

PRECISION: dict[str, Arrival] = {
    "fp16": Arrival(
        {"enabled": True, "loss_scale": 128},
        lambda c: [c.engine.settings.dtype, c.engine.loss_scale.value],
        ["fp16", 128.0],
    ),
    "bf16": Arrival({"enabled": True}, lambda c: c.weight(EMBEDDING).dtype, torch.bfloat16),
    "precision": Arrival("bfloat16", lambda c: c.weight(EMBEDDING).dtype, torch.bfloat16),
    "data_types": Arrival({"grad_accum_dtype": "bf16"}, _accumulates_in_fp32, False, {"bf16": {"enabled": True}}),
}

TRAINING: dict[str, Arrival] = {
    "train_iters": Arrival(8, option("train_iters")),
    "train_epochs": Arrival(3, lambda c: getattr(_train_set(c), "epochs", 0)),
    "eval_iters": Arrival(3, lambda c: c.fit["actions"].validate.count),
    "eval_interval": Arrival(2, option("eval_interval")),
    "exit_interval": Arrival(7, option("exit_interval")),
    "seed": Arrival(99, lambda c: [c.engine.settings.seed, c.call("split")["seed"], _masking(c).seed], [99, 99, 99], JRT),
    "checkpoint_activations": Arrival(True, _setting("activation_checkpoint_interval"), 1),
    "checkpoint_num_layers": Arrival(2, _setting("activation_checkpoint_interval"), 2, {"checkpoint_activations": True}),
    "eod_mask_loss": Arrival(True, lambda c: bool((c.batch.loss_mask[c.batch.tokens == 0] == 0).all())),
    "reset_state_at_eod": Arrival(True, lambda c: c.batch.segment_ids is not None),
    "reset_attention_at_eod": Arrival(True, lambda c: c.batch.segment_ids is not None),
    "objective": Arrival("prefix", _objective("name"), beside={"objective_prefix_length": 8}),
    "objective_prefix_length": Arrival(
        8, lambda c: [_objective("prefix_length")(c), _masking(c).prefix_length], [8, 8], {"objective": "jrt"}
    ),
    "objective_masked_weight": Arrival(0.5, _objective("masked_weight"), beside=JRT),
    "objective_mask_rate": Arrival(0.5, lambda c: _masking(c).rate, beside=JRT),
    "objective_mask_token": Arrival(3, lambda c: _masking(c).mask_token, beside=JRT),
    "loss_mean_over": Arrival("micro_batch", _objective("mean_over")),
    "kernel_backend": Arrival("reference", lambda c: c.engine.local.stages[1].backend),
    "loss_chunk_tokens": Arrival(
        16, lambda c: [c.engine.settings.loss_chunk_tokens, c.engine.local.stages[-1].logits], [16, False]
    ),
}

DATA: dict[str, Arrival] = {
    "data_path": Arrival("second", call("split", "data_path")),
    "train_data_paths": Arrival(["third"], call("list.train", "paths"), beside=LISTS),
    "valid_data_paths": Arrival(["second"], call("list.valid", "paths"), beside=LISTS),
    "test_data_paths": Arrival(["second"], call("list.test", "paths"), beside=LISTS),
    "train_label_data_paths": Arrival(["second_labels", "third_labels"], call("list.train", "label_paths"), beside=LISTS),
    "valid_label_data_paths": Arrival(["third_labels"], call("list.valid", "label_paths"), beside=LISTS),
    "test_label_data_paths": Arrival(["third_labels"], call("list.test", "label_paths"), beside=LISTS),
    "train_data_weights": Arrival([1.0, 3.0], call("list.train", "weights"), beside=LISTS),
    "valid_data_weights": Arrival([3.0], call("list.valid", "weights"), beside=LISTS),
    "test_data_weights": Arrival([3.0], call("list.test", "weights"), beside=LISTS),
    "weight_by_num_documents": Arrival(True, call("list.train", "documents_alpha"), 1.0, LISTS),
    "weighted_sampler_alpha": Arrival(
        0.5, call("list.train", "documents_alpha"), 0.5, {**LISTS, "weight_by_num_documents": True}
    ),
    "split": Arrival("80, 10, 10", call("split", "split")),
    "pack_impl": Arrival(
        "unpacked", lambda c: [c.call("split")["pack_impl"], type(_train_set(c)).__name__], ["unpacked", "PaddedDataset"]
    ),
    "allow_chopped": Arrival(False, call("split", "allow_chopped"), beside={"pack_impl": "unpacked", "seq_length": 64}),
    "train_stream": Arrival(["text.jsonl"], call("stream", "inputs")),
    "valid_stream": Arrival(["more.jsonl"], call("stream", "inputs"), beside=STREAMS),
    "test_stream": Arrival(["more.jsonl"], call("stream", "inputs"), beside=STREAMS),
    "stream_key": Arrival("body", call("stream", "key"), beside=STREAMS),
    "stream_repeat": Arrival(False, call("stream", "repeat"), beside=STREAMS),
    "synthetic": Arrival(
        {
            "task": "mqar",
            "length": 24,
            "pairs": 2,
            "vocab_size": 32,
            "train": [{"examples": 40}],
            "test": [{"examples": 4}],
        },
        lambda c: [type(_train_set(c)).__name__, c.engine.settings.objective.count_answers],
        ["SyntheticDataset", True],
    ),
    "num_workers": Arrival(3, call("batches", "num_workers")),
}

TABLES = (PARALLEL, OPTIMIZER, SCHEDULE, BATCH, PRECISION, TRAINING, DATA)
