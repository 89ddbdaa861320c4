"""Exchanges of context parallelism with their gradients: the carry of a state, a halo of tokens, all-to-all, a sum.

An exchange that can travel while the layer computes is two nodes of the graph, `_Send` and `_Receive`, with a token between
them. What a layer computes between the two overlaps with the message in the forward, and its gradients overlap with the
message of the backward: autograd runs the nodes that are ready from the last one created to the first, so `_Receive` starts
the message back, then come the gradients of what was computed in between, and `_Send`, created before them, waits last.

Every rank builds the same graph: the first one receives zeros, never None. Under activation recomputation a rank with a shorter
graph would stop before a collective for which the others wait.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.precision import outside_autocast
from megatron.parallel.context_messages import ContextMessages, Wait


class Exchange(Protocol):
    """A message forward and a message back. An object serves one pass forward, and the passes back through its two nodes."""

    def send(self, *sent: Tensor | None) -> None:
        """Start the message forward."""

    def receive(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Wait for it: the result, and what `send_gradient` reads."""

    def send_gradient(self, grad: Tensor, *saved: Tensor | None) -> None:
        """Start the message back: the contiguous gradient of the result."""

    def receive_gradient(self) -> tuple[Tensor | None, ...]:
        """Wait for it: the gradients of what was sent."""


def start_exchange(exchange: Exchange, *sent: Tensor | None) -> Wait:
    """Send; the returned function waits for the result, and must be called."""
    token = _Send.apply(exchange, *sent)
    return lambda: _Receive.apply(exchange, token)


@outside_autocast
class _Send(torch.autograd.Function):
    """Starts a message; backward, waits for the one that `_Receive` started."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *sent: Tensor | None) -> Tensor:
        ctx.exchange = exchange
        exchange.send(*sent)
        first = sent[0]
        assert first is not None
        return first.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.receive_gradient()


@outside_autocast
class _Receive(torch.autograd.Function):
    """Waits for the message of `_Send`; backward, starts the one back."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, token: Tensor) -> Tensor:
        # a recomputed pass has an exchange of its own, whereas the nodes of the first pass run backward: between the passes an
        # exchange keeps nothing, and saved tensors are those of the latest pass
        ctx.exchange = exchange
        received, saved = exchange.receive()
        ctx.save_for_backward(*saved)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.send_gradient(grads[0].contiguous(), *ctx.saved_tensors)
        return None, grads[0].new_empty(0)


class Carry:
    """O_r = T_r O_(r-1) + A_r over the ranks with T = through D; the result is enters_r O_(r-1).

    Args:
        messages: of this rank.
        factors: `enters` and `through` of every rank, [P, b]; see `parallel/context.py`. None for ones.
        matrix: D is a matrix [b, h, k, k] that multiplies the state from the left.
        reverse: from right to left.
        scan: in log2 P rounds, which follow from each other and travel in `receive` and `receive_gradient`.
    """

    def __init__(
        self,
        messages: ContextMessages,
        factors: tuple[Tensor | None, Tensor | None],
        matrix: bool = False,
        reverse: bool = False,
        scan: bool = False,
    ) -> None:
        self.messages, self.matrix, self.reverse, self.scan = messages, matrix, reverse, scan
        self.enters, self.through = factors
        self._sent: tuple[Wait, Tensor, Tensor | None]
        self._sent_gradient: tuple[Wait, torch.Size, tuple[Tensor | None, ...]]

    def send(self, *sent: Tensor | None) -> None:
        """A in the accumulation dtype and D in the same, or None for 1; both contiguous."""
        state, decay = sent
        assert state is not None
        # detached: a tensor kept here must not keep the graph
        state, decay = state.detach(), None if decay is None else decay.detach()
        if self.scan:
            wait = self._start_scan(state, self._total(decay, state), -1 if self.reverse else 1)
        else:
            # states and decays in one message
            flat = state.flatten() if decay is None else torch.cat([state.flatten(), decay.flatten()])
            wait = self.messages.start_all_gather(flat)
        self._sent = wait, state, decay

    def receive(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The incoming state; with a decay it is kept, as are the factors of all ranks where they were gathered."""
        wait, state, decay = self._sent
        del self._sent
        factors = None
        if self.scan:
            before = wait()
        else:
            states, factors = self._cut(wait(), state, decay)
            before = _fold(*_ordered(states, factors, self.messages.rank, left=not self.reverse), self.matrix)
        incoming = self._entering(before)
        return incoming, (None if decay is None else incoming, decay, factors)

    def send_gradient(self, grad: Tensor, *saved: Tensor | None) -> None:
        """The gradient of the incoming state, where a document continues into this shard."""
        own = self._entering(grad)
        if self.scan:
            total = self._total(saved[1], grad)
            total = total.transpose(-1, -2) if self.matrix and total is not None else total
            wait = self._start_scan(own, total, 1 if self.reverse else -1)
        else:
            wait = self.messages.start_all_gather(own.flatten())
        self._sent_gradient = wait, own.shape, saved

    def receive_gradient(self) -> tuple[Tensor | None, ...]:
        """Gradients of A and D."""
        wait, shape, (incoming, decay, factors) = self._sent_gradient
        del self._sent_gradient
        after = wait()
        if not self.scan:
            factors = factors.transpose(-1, -2) if self.matrix and factors is not None else factors
            ordered = _ordered(after.unflatten(1, shape), factors, self.messages.rank, left=self.reverse)
            after = _fold(*ordered, self.matrix)
        if decay is None or incoming is None:
            return after, None
        dstate = after if self.through is None else after * _per_row(self.through[self.messages.rank], after)
        ddecay = dstate @ incoming.transpose(-1, -2) if self.matrix else (dstate * incoming).sum_to_size(decay.shape)
        return after, ddecay

    def _entering(self, x: Tensor) -> Tensor:
        return x if self.enters is None else x * _per_row(self.enters[self.messages.rank], x)

    def _total(self, decay: Tensor | None, state: Tensor) -> Tensor | None:
        """T of this rank, which broadcasts against its state; None for 1."""
        if self.through is None:
            return decay
        factor = _per_row(self.through[self.messages.rank], state)
        return factor if decay is None else decay * factor

    def _cut(self, gathered: Tensor, state: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A and T of all ranks, [P, b, *]."""
        states = gathered[:, : state.numel()].unflatten(1, state.shape)
        if decay is None:
            return states, None if self.through is None else _per_row(self.through, states)
        decays = gathered[:, state.numel() :].unflatten(1, decay.shape)
        return states, decays.clone() if self.through is None else decays * _per_row(self.through, decays)

    def _start_scan(self, value: Tensor, factor: Tensor | None, step: int) -> Wait:
        """Exclusive scan of (T, A) over the ranks in direction `step`, 1 or -1: what all ranks before leave behind."""

        def wait() -> Tensor:
            x, t, distance = value, factor, 1
            while distance < self.messages.size:
                if t is None:
                    x = x + self.messages.start_shift(x.contiguous(), step * distance)()
                else:
                    # a rank without a neighbour receives zeros: nothing comes in, and its factor is not used again
                    flat = self.messages.start_shift(torch.cat([x.flatten(), t.flatten()]), step * distance)()
                    x = x + _act(t, flat[: x.numel()].view(x.shape), self.matrix)
                    t = _act(t, flat[x.numel() :].view(t.shape), self.matrix)
                distance *= 2
            return self.messages.start_shift(x.contiguous(), step)()

        return wait


def _per_row(factors: Tensor, x: Tensor) -> Tensor:
    """Factors [..., b] in x's dtype, with the dimensions of x [..., b, *] behind."""
    return factors.to(x.dtype).reshape(*factors.shape, *[1] * (x.dim() - factors.dim()))


def _act(factor: Tensor | None, state: Tensor, matrix: bool) -> Tensor:
    """A shard's total decay applied to a state: a factor, or a matrix [.., k, k] from the left."""
    if factor is None:
        return state
    return factor @ state if matrix else factor * state


def _fold(values: Tensor, factors: Tensor | None, matrix: bool) -> Tensor:
    """sum_i F_0 ... F_(i-1) x_i over the shards at distance i = 0, 1, ...

    Args:
        values: x, [n, b, *]; zeros result from n = 0.
        factors: F, [n, b, *], broadcast against `values`; None for ones.
        matrix: factors are matrices [n, b, h, k, k], which multiply from the left.
    """
    if factors is None:
        return values.sum(0)
    if not matrix:
        weights = torch.cat([torch.ones_like(factors[:1]), factors[:-1]]).cumprod(0)
        return (weights * values).sum(0)
    total = torch.zeros_like(values[0]) if len(values) else values.sum(0)
    for x, factor in zip(values.flip(0), factors.flip(0), strict=True):
        total = x + factor @ total
    return total


def _ordered(values: Tensor, factors: Tensor | None, rank: int, left: bool) -> tuple[Tensor, Tensor | None]:
    """What the shards on one side of `rank` hold, nearest first."""
    if left:
        return values[:rank].flip(0), None if factors is None else factors[:rank].flip(0)
    return values[rank + 1 :], None if factors is None else factors[rank + 1 :]


class Halo:
    """The left neighbour's last n tokens; their gradient travels back and is added to those tokens'.

    Args:
        messages: of this rank.
        n: tokens.
        hidden: [b, n], True where a token is not visible and zeros are received; None where all are.
    """

    def __init__(self, messages: ContextMessages, n: int, hidden: Tensor | None) -> None:
        self.messages, self.n, self.hidden = messages, n, hidden
        self._sent: Wait
        self._shape: torch.Size

    def send(self, *sent: Tensor | None) -> None:
        """The last tokens of x [b, s, ...]."""
        (x,) = sent
        assert x is not None
        self._shape = x.shape
        self._sent = self.messages.start_shift(x.detach()[:, x.shape[1] - self.n :].contiguous(), 1)

    def receive(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The halo, [b, n, ...]."""
        return self._visible(self._take()), ()

    def send_gradient(self, grad: Tensor, *saved: Tensor | None) -> None:
        """The visible part of the halo's gradient."""
        self._sent = self.messages.start_shift(self._visible(grad), -1)

    def receive_gradient(self) -> tuple[Tensor | None, ...]:
        """The gradient of x: zeros but for its last tokens."""
        received = self._take()
        dx = received.new_zeros(self._shape)
        dx[:, dx.shape[1] - self.n :] = received
        return (dx,)

    def _take(self) -> Tensor:
        wait = self._sent
        del self._sent
        return wait()

    def _visible(self, x: Tensor) -> Tensor:
        if self.hidden is None:
            return x
        return x.masked_fill(self.hidden.to(x.device).reshape(*self.hidden.shape, *[1] * (x.dim() - 2)), 0)


def all_to_all(x: Tensor, messages: ContextMessages, to_heads: bool) -> Tensor:
    """[b, s, h, k] -> [b, S, h / P, k] (`to_heads`), or back."""
    return _AllToAll.apply(x, messages, to_heads)


def all_reduce(x: Tensor, messages: ContextMessages) -> Tensor:
    """The sum over the ranks."""
    return _Sum.apply(x, messages)


@outside_autocast
class _AllToAll(torch.autograd.Function):
    """Between "all heads of my tokens" and "all tokens of my heads"; the backward is the opposite exchange."""

    @staticmethod
    def exchange(x: Tensor, messages: ContextMessages, to_heads: bool) -> Tensor:
        """One all-to-all; blocks of heads or of tokens are put outermost for it."""
        size = messages.size
        blocks = x.unflatten(2, (size, -1)).movedim(2, 0) if to_heads else x.unflatten(1, (size, -1)).movedim(1, 0)
        received = messages.all_to_all(blocks.contiguous())
        return received.movedim(0, 1).flatten(1, 2) if to_heads else received.movedim(0, 2).flatten(2, 3)

    @staticmethod
    def forward(ctx: Any, x: Tensor, messages: ContextMessages, to_heads: bool) -> Tensor:
        ctx.messages, ctx.to_heads = messages, to_heads
        return _AllToAll.exchange(x, messages, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.exchange(grads[0], ctx.messages, not ctx.to_heads), None, None


@outside_autocast
class _Sum(torch.autograd.Function):
    """All-reduce in both directions: every rank's result depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, messages: ContextMessages) -> Tensor:
        ctx.messages = messages
        return messages.all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.messages.all_reduce(grads[0]), None
