"""The way out and in: folders for transformers out of our own sources, and released models as checkpoints."""
