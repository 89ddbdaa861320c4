"""The shell blocks of the documentation run as tests; see tests/docs/blocks.py for the comments that mark them."""
