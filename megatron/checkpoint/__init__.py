"""Checkpoints: folders that are either whole or absent, described by one manifest, readable on any mesh.

layout.py     names of folders and files, what lies in a save folder
manifest.py   `manifest.json`: every tensor, slice, file, size and SHA-256
safetensors_writer.py    safetensors files: streamed writing with the hash on the way, checked reading
regions.py      pure arithmetic of slices: which part of which file fills which part of a tensor
collective_errors.py      one outcome on all ranks
shard_contents.py, shard_manifests.py, save.py, commit.py, retention.py   writing, renaming into place, deleting
find.py, tensor_reader.py, load.py   choosing, checking and reading
"""
