"""How many pipeline stages a model can have, and how many blocks a recomputed segment has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron.engine import stages
from megatron.engine.base import EngineSettings
from megatron.engine.stages import check_mesh, run_stages
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh


def test_as_many_stages_as_blocks_are_possible() -> None:
    config = ModelConfig(32, 16, 2, 2, 24, ("metala", "metala"))
    check_mesh(config, Mesh.shape_only(2, 1, 2, 0))
    with pytest.raises(ConfigError, match="2 layers cannot fill 3 pipeline stages"):
        check_mesh(config, Mesh.shape_only(3, 1, 3, 0))


@pytest.mark.parametrize(("interval", "pieces"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (9, [5])])
def test_recomputed_pieces_have_as_many_blocks_as_asked_for(
    interval: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(function: Any, piece: Sequence[Any], *activations: Any, **_: Any) -> Any:
        seen.append(len(piece))
        return function(piece, *activations)

    monkeypatch.setattr(stages, "checkpoint", counted)
    config = ModelConfig(32, 16, 5, 2, 24, ("metala",) * 5)
    local = stages.build_local(config, Mesh.single(), EngineSettings(), torch.device("cpu"))
    run_stages(local.stages, (torch.zeros(1, 4, dtype=torch.long),), interval)
    assert seen == pieces
