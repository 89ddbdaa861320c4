"""Export: Hugging Face folders built from our own sources, model cards, and publication on the Hub."""
