"""Sharding by plan: the pieces are right, a split model computes what the whole one does, with four collectives per block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron.errors import ConfigError, DataError
from megatron.layers.base import Context
from megatron.model.build import build_model, param_specs
from megatron.model.init import initial_value
from megatron.model.linear_loss import linear_token_loss
from megatron.model.loss import token_loss
from megatron.model.parallel_loss import vocab_parallel_token_loss
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import local_slice, shard_model
from tests.engine.engine_cases import model_config
from tests.parallel.ranks import run_ranks


def whole_model(**changes: Any) -> Any:
    config = model_config(**changes)
    model, specs = build_model(config).double(), param_specs(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(initial_value(specs[name], config, 1))
            param.add_(0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name))))
    return model, specs


def _compare(tied: bool) -> dict[str, float]:
    """fp64: logits, loss and every gradient of a split model against the whole one, on this rank's parts."""
    mesh = Mesh.create(1, 2, 2, dist.get_rank())
    whole, specs = whole_model(tied=tied)
    part, _ = whole_model(tied=tied)
    shard_model(part, specs, mesh)
    x = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    want = whole(x, Context())[0]
    got = part(x, Context())[0]
    piece = want.chunk(2, -1)[mesh.tp_rank]
    want.square().sum().backward()
    got.square().sum().backward()
    gradients = {n: p.grad for n, p in part.named_parameters()}
    errors = {"logits": (got - piece).abs().max().item()}
    for name, param in whole.named_parameters():
        place = local_slice(specs[name], mesh)
        grad = param.grad if place.dim is None else param.grad.narrow(place.dim, place.start, place.stop - place.start)
        errors[name] = (grad - gradients[name]).abs().max().item() / (grad.abs().max().item() + 1e-30)
    for name, grad in gradients.items():
        if specs[name].cut == "replicated":
            assert grad is not None
            replicas = [torch.empty_like(grad) for _ in range(mesh.tp)]
            torch.distributed.all_gather(replicas, grad.contiguous(), group=mesh.tp_group)
            assert all(torch.equal(replica, grad) for replica in replicas), name
    return errors


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_split_model_equals_whole_model_in_fp64(tied: bool) -> None:
    for errors in run_ranks(_compare, 2, tied):
        assert max(errors.values()) < 1e-10, errors


def _count() -> dict[str, int]:
    mesh = Mesh.create(1, 2, 2, dist.get_rank())
    model, specs = whole_model()
    shard_model(model, specs, mesh)
    calls: list[int] = []
    real = dist.all_reduce

    def counting(tensor: torch.Tensor, **options: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, **options)

    dist.all_reduce = counting
    names = (
        "all_gather",
        "broadcast",
        "reduce_scatter",
        "all_to_all",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    )
    for name in names:
        setattr(dist, name, None)  # any other collective would raise
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    block = model.model.layers[0]
    y = block(x, Context())[0]
    forward = len(calls)
    y.sum().backward()
    return {"forward": forward, "backward": len(calls) - forward, "largest": max(calls)}


def test_two_all_reduces_per_block_and_direction() -> None:
    for count in run_ranks(_count, 2):
        assert count == {"forward": 2, "backward": 2, "largest": 2 * 9 * 32}


def _loss(mask_zero: bool) -> dict[str, float]:
    mesh = Mesh.create(1, 2, 2, dist.get_rank())
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 64, generator=g) * 20).requires_grad_()
    labels = torch.randint(0, 64, (3, 5), generator=g)
    labels[0, 2], labels[1, 0] = -100, 63
    mask = torch.zeros(3, 5) if mask_zero else (torch.rand(3, 5, generator=g) > 0.3).float()
    local = logits.detach().chunk(2, -1)[mesh.tp_rank].clone().requires_grad_()
    want = token_loss(logits, labels, mask)
    got = vocab_parallel_token_loss(local, labels, mask, mesh.tp_group)
    want.backward()
    got.backward()
    piece = logits.grad.chunk(2, -1)[mesh.tp_rank]
    return {"loss": (got - want).abs().item(), "grad": (local.grad - piece).abs().max().item()}


@pytest.mark.parametrize("mask_zero", [False, True])
def test_vocab_parallel_loss_equals_the_plain_one(mask_zero: bool) -> None:
    for errors in run_ranks(_loss, 2, mask_zero):
        assert errors["loss"] < 1e-5
        assert errors["grad"] < 1e-7


def test_loss_without_a_group_and_bad_labels() -> None:
    logits, labels = torch.randn(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, 7]])
    mask = torch.ones(2, 3)
    got = vocab_parallel_token_loss(logits, labels, mask, None)
    assert torch.allclose(got, F.cross_entropy(logits.view(-1, 8), labels.view(-1)))
    labels[1, 1] = 8
    with pytest.raises(DataError, match="label id 8 is outside the vocabulary of 8"):
        vocab_parallel_token_loss(logits, labels, mask, None)
    mask[1, 1] = 0
    assert torch.isfinite(vocab_parallel_token_loss(logits, labels, mask, None))


def test_ignored_labels_are_the_same_in_every_cross_entropy() -> None:
    """-100 and weight 0 leave a token out alike, with and without the logits; in fp64."""
    g = torch.Generator().manual_seed(3)
    x, matrix = torch.randn(2, 5, 4, generator=g, dtype=torch.float64), torch.randn(8, 4, generator=g, dtype=torch.float64)
    labels, mask = torch.randint(0, 8, (2, 5), generator=g), torch.rand(2, 5, generator=g)
    left_out = torch.zeros(2, 5, dtype=torch.bool)
    left_out[0, 1] = left_out[1, 3:] = True
    want = token_loss(x @ matrix.t(), labels, mask * ~left_out)
    ignored = labels.masked_fill(left_out, -100)
    for loss in (
        token_loss(x @ matrix.t(), ignored, mask),
        vocab_parallel_token_loss(x @ matrix.t(), ignored, mask, None),
        linear_token_loss(x, matrix, ignored, mask),
        token_loss(x @ matrix.t(), labels.masked_fill(left_out, 99), mask * ~left_out),
    ):
        assert (loss - want).abs() < 1e-12


def test_what_does_not_divide_names_the_parameter() -> None:
    config = model_config(mlp_width=50)
    with torch.device("meta"):
        model = build_model(config)
    with pytest.raises(ConfigError, match=r"channel_mixer.*model_parallel_size 4"):
        shard_model(model, param_specs(config), Mesh.shape_only(1, 4, 4, 0))
