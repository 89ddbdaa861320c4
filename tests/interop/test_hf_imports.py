"""The import of transformers' model classes: what torchao says of itself is dropped, other messages of its loggers are not."""

from __future__ import annotations

import enum
import importlib
import logging

import pytest

from megatron.interop.hf_imports import import_model_classes


class _Preference(enum.Enum):
    AUTO = 1


_Preference.__module__ = "torchao.kernel"


class _Other(enum.Enum):
    AUTO = 1


def test_only_messages_about_torchao_itself_are_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    imported: list[str] = []

    def speaking(name: str) -> None:
        imported.append(name)
        logging.getLogger("torchao").warning("Failed to load /x/_C.so: Could not load this library")
        logging.getLogger("torchao").warning("torchao needs another torch")
        for subject in (_Preference, _Other):
            logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass", subject)

    monkeypatch.setattr(importlib, "import_module", speaking)
    for name in ("torchao", "torch.utils._pytree"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [caplog.handler])
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
    import_model_classes()
    assert imported == ["transformers.modeling_utils"]
    assert caplog.messages == ["torchao needs another torch", f"{_Other} is an Enum subclass"]
    logging.getLogger("torchao").warning("Failed to load later")
    assert caplog.messages[-1] == "Failed to load later"
