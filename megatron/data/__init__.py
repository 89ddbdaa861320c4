"""The way of the text: files of tokens, the order they are read in, and the batches a rank receives."""
