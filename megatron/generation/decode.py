"""One decode step of a fixed batch with in-place states, captured as a CUDA graph and replayed.

The decode loop that calls it for token after token is `decode` in `generation/sample.py`.

A decode step launches hundreds of small kernels, which on a GPU takes longer than running them. Tokens, states and logits have
fixed buffers, the mixers' fused kernels update states in place, and from the third token on the step is a single launch: the
first token runs eagerly, which also compiles and warms up the kernels, the second is captured.

On a CPU the same code runs without a graph, which is how it is tested there.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from megatron.layers.base import Context, State
from megatron.model.lm import LanguageModel


class TokenStep:
    """`tokens [b]` -> `logits [b, n]`, from its own state, which each call advances by one token.

    A model whose states grow with the text (keys and values of softmax attention) cannot be recorded: its steps run eagerly.
    """

    def __init__(self, model: LanguageModel, state: list[State], backend: str = "auto", record: bool | None = None) -> None:
        """Copies `state`; `record` is whether to capture a graph, by default on a GPU only."""
        self.model = model
        self.state: list[State] = [{name: t.clone() for name, t in part.items()} for part in state]
        self.ctx = Context(backend=backend, in_place=True)
        device = model.model.embed_tokens.weight.device
        self.record = device.type == "cuda" if record is None else record
        self.fixed = True
        self.tokens: Tensor | None = None
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits after these tokens, a copy that later calls do not change."""
        if self.tokens is None:
            self.tokens = tokens.clone()
            self._on_a_side_stream()
        else:
            self.tokens.copy_(tokens)
            if self.graph is not None:
                self.graph.replay()
            elif self.record and self.fixed:
                self._recorded()
            else:
                self._run()
        return cast(Tensor, self.logits).clone()

    def _run(self) -> None:
        """One step on the buffers; states that a layer did not update in place are copied back."""
        assert self.tokens is not None
        logits, after = self.model.step(self.tokens, self.state, self.ctx)
        self.fixed = self.fixed and all(
            new[name].shape == old[name].shape and new[name].dtype == old[name].dtype
            for old, new in zip(self.state, after, strict=True)
            for name in old
        )
        self.logits = logits
        if not self.fixed:
            self.state = after
            return
        for old, new in zip(self.state, after, strict=True):
            for name, buffer in old.items():
                if new[name] is not buffer:
                    buffer.copy_(new[name])

    def _on_a_side_stream(self) -> None:
        """The first step; libraries initialise outside the stream that is captured later."""
        if not self.record:
            self._run()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)

    def _recorded(self) -> None:
        """Capture a step, which does not run it, then replay it; a step that cannot be captured runs eagerly from now on."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:
            logging.getLogger("megatron").warning("token step without a CUDA graph: %s", str(error).splitlines()[0])
            self.record = False
            self._run()
            return
        self.graph = graph
        graph.replay()
