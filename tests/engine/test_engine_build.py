"""What is refused before an engine takes memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.errors import ConfigError
from megatron.parallel.mesh import Mesh
from tests.training.runs import MODEL


def test_a_model_that_no_machine_holds_is_refused_by_its_size() -> None:
    """A hidden size of a million would ask the allocator for two terabytes."""
    with pytest.raises(ConfigError, match=r"its matrices alone take [0-9,]+ GiB") as caught:
        build_engine("single", replace(MODEL, hidden_size=1 << 20), Mesh.single(), EngineSettings(seq_length=16))
    assert "hidden_size" in str(caught.value)


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "vocab_size", "num_heads", "mlp_width"])
@pytest.mark.parametrize("value", [10**9, -1, 2.0, "2"])
def test_sizes_of_a_model(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is "):
        replace(MODEL, **{field: value})  # type: ignore[arg-type]
