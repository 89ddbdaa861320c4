"""Pretraining of linear-attention language models with the habits of GPT-NeoX.

Importing this package needs nothing but Python; `torch` is imported by the parts that compute, and `deepspeed` by
`megatron/engine/deepspeed_pipeline.py` alone.
"""

__version__ = "0.2.0"
