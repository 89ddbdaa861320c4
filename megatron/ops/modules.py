"""Building blocks of mixers and MLPs that are called as modules, so that adapters and hooks take effect.

Users of an exported model attach LoRA adapters, quantised weights, offload hooks and forward hooks to its modules. These work
only if the module is called. A fused path that reads `weight` itself is limited to plain modules; `are_plain` decides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.ops.conv.operator import causal_conv


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's `forward`: hooks, or a `forward` replaced on the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def are_plain(*linears: nn.Module) -> bool:
    """Whether each module is an `nn.Linear` without hooks, whose weight is a plain tensor in memory.

    Adapters and quantised layers are other classes; quantised or sharded weights are tensor subclasses.
    """
    return all(
        type(linear) is nn.Linear
        and not has_hooks(linear)
        and type(linear.weight) in (nn.Parameter, Tensor)
        and not linear.weight.is_meta
        for linear in linears
    )


def row_linear(linear: nn.Linear, x: Tensor, join: nn.Module) -> Tensor:
    """`linear` on x [..., k] -> [..., d], where k is this tensor-parallel rank's shard of the width.

    Args:
        linear: the output projection; called as a module on one device.
        x: input.
        join: sums the ranks' partial results; the identity on one device. The bias is added once, after it.
    """
    if isinstance(join, nn.Identity):
        return linear(x)
    y = join(F.linear(x, linear.weight))
    return y if linear.bias is None else y + linear.bias


class ShortConv(nn.Conv1d):
    """Causal depthwise convolution over the sequence with `nn.Conv1d`'s parameters, SiLU included; see `ops/conv/`."""

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, history: Tensor | None = None, segment_ids: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """`x [b, s, d]` -> `[b, s, d]`.

        Args:
            x: inputs.
            history: the last width - 1 inputs before x, [b, width - 1, d]; None for zeros.
            segment_ids: document numbers [b, s]; the convolution does not cross document boundaries.
            backend: path of the operator.
        """
        if x.shape[1] == 1 and history is not None and segment_ids is None and not torch.is_grad_enabled():
            window = torch.cat([history.to(x.dtype), x], dim=1)
            total = (window * self.weight[:, 0].t()).sum(1, keepdim=True)
            return F.silu(total if self.bias is None else total + self.bias).to(x.dtype)
        return causal_conv(x, self.weight, self.bias, history=history, segment_ids=segment_ids, backend=backend)
