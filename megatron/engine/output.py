"""From the last stage's output to the loss of a micro batch, for all engines.

The output is logits, or, with `loss_chunk_tokens`, the hidden states before the LM head, whose logits then exist for one
block of tokens at a time.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from megatron.engine.base import EngineSettings
from megatron.engine.stages import LocalModel
from megatron.errors import ConfigError
from megatron.model.linear_loss import linear_token_loss
from megatron.model.objectives import MeanLoss, counted_terms, objective_loss
from megatron.model.parallel_loss import vocab_parallel_token_loss
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import Mesh


def check_output(settings: EngineSettings) -> None:
    """Reject `loss_chunk_tokens` if something else needs the logits, or the matrix is not available outside its own forward.

    Raises:
        ConfigError: with the reason.
    """
    if not settings.loss_chunk_tokens:
        return
    reason = ""
    if settings.zero_stage == 3:
        reason = "ZeRO-3 gathers the output projection for its own forward only"
    if settings.objective.count_answers:
        reason = "a synthetic task counts right answers in the logits, which are never formed together"
    if reason:
        raise ConfigError("loss_chunk_tokens cannot be used here", why=reason, hint="loss_chunk_tokens: 0")


def _mean_loss(settings: EngineSettings, local: LocalModel, mesh: Mesh) -> MeanLoss:
    """Mean loss over the counted tokens of (output of the last stage, labels, mask)."""
    if not settings.loss_chunk_tokens:
        return partial(vocab_parallel_token_loss, group=mesh.tp_group)
    block, backend, matrix = settings.loss_chunk_tokens, settings.kernel_backend, local.output_matrix()
    return lambda x, y, w: linear_token_loss(x, matrix, y, w, mesh.tp_group, block=block, backend=backend)


def local_loss(
    settings: EngineSettings,
    local: LocalModel,
    mesh: Mesh,
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    divisors: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro batch and its parts, see `objective_loss`.

    On a context-parallel rank it is the shard's part, times the number of ranks: the average over all replicas, which the
    engine takes, is the loss of the whole rows.

    Args:
        settings: settings of the engine.
        local: this rank's part of the model.
        mesh: the mesh.
        logits: this tensor rank's columns [b, s, n], or with `loss_chunk_tokens` the hidden states [b, s, d].
        labels: [b, s].
        mask: weights [b, s].
        divisors: divisors of the step, see `global_divisors`.
    """
    mean, objective = _mean_loss(settings, local, mesh), settings.objective
    offset = mesh.cp_rank * labels.shape[1]
    if divisors is None and mesh.cp > 1:  # the mean is over the whole micro batch, of which every rank has a shard
        divisors = all_reduce(counted_terms(objective, labels, mask, offset), mesh.cp_group) / mesh.cp
    return objective_loss(objective, logits, labels, mask, mean, divisors, mesh.tp_group, offset)
