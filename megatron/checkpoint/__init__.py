"""Checkpoints: folders that are either whole or absent, described by one manifest, readable on any mesh.

layout.py     names of folders and files, what lies in a save folder
manifest.py   `manifest.json`: every tensor, slice, file, size and SHA-256
tensors.py    safetensors files: streamed writing with the hash on the way, checked reading
boxes.py      pure arithmetic of slices: which part of which file fills which part of a tensor
agree.py      one verdict of all ranks
shards.py, receipts.py, save.py, commit.py, retention.py   writing, renaming into place, deleting
find.py, source.py, load.py   choosing, checking and reading
"""
