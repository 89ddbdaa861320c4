"""Label smoothing of transformers' Trainer on a folder with code of its own: the fault that the card names, and its remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron.export.hf import export_checkpoint

TINY = 1e-9  # so little smoothing must not be seen


@pytest.fixture
def table() -> Iterator[dict[str, str]]:
    """transformers' table of class names, as it was before at the end."""
    before = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    yield MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.clear()
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(before)


def losses(model: Any, folder: Path, smoothing: float, accumulate: int = 1) -> list[float]:
    """Of two steps on rows of which the first tokens carry no loss."""
    tokens = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (i % 14) + row[i % 14 :]} for i, row in enumerate(tokens)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        label_smoothing_factor=smoothing,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        data_seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"layer_types": ("metala", "alibi")}], ids=["metala", "hybrid"])
def test_the_remedy_of_the_card(
    make_checkpoint: Callable[..., Path], tmp_path: Path, table: dict[str, str], changes: dict[str, Any]
) -> None:
    folder = export_checkpoint(make_checkpoint(**changes), tmp_path / "hf").folder

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    model = load()
    plain = losses(load(), tmp_path, 0.0)
    assert losses(load(), tmp_path, TINY) == pytest.approx(plain, rel=1e-5), "the model enters itself in the table"
    without = load()
    table.pop(model.config.model_type)
    wrong = losses(without, tmp_path, TINY)
    assert abs(wrong[0] - plain[0]) > 0.05, "transformers shifts the labels by now: the card's section can go"
    section = (folder / "README.md").read_text().split("### Label smoothing")[1]
    remedy = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert remedy is not None
    for accumulate in (1, 4):
        model = load()
        table.pop(model.config.model_type)
        exec(compile(remedy[1], "card", "exec"), {"model": model})
        assert losses(model, tmp_path, TINY, accumulate) == pytest.approx(plain, rel=1e-5)
    assert losses(load(), tmp_path, TINY, accumulate=4) == pytest.approx(plain, rel=1e-5)
    assert losses(load(), tmp_path, 0.1) != pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_with_an_adapter(make_checkpoint: Callable[..., Path], tmp_path: Path, table: dict[str, str]) -> None:
    peft = pytest.importorskip("peft")
    folder = export_checkpoint(make_checkpoint(), tmp_path / "hf").folder

    def load() -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    assert losses(load(), tmp_path, TINY) == pytest.approx(losses(load(), tmp_path, 0.0), rel=1e-5)
