"""The MetaLA operator: one pass, one step, and the projections in front of them."""

from megatron.ops.metala.inputs import MetaLAInputs, cut_packed
from megatron.ops.metala.operator import metala, metala_packed
from megatron.ops.metala.projections import MetaLAProjections, metala_projected
from megatron.ops.metala.reference import decay_and_key, finish_metala
from megatron.ops.metala.step import metala_step, metala_step_

__all__ = [
    "MetaLAInputs",
    "MetaLAProjections",
    "cut_packed",
    "decay_and_key",
    "finish_metala",
    "metala",
    "metala_packed",
    "metala_projected",
    "metala_step",
    "metala_step_",
]
