"""Exported folders in vLLM: one plugin for every mixer, by the contract in `layers/base.py`."""
