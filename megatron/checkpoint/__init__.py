"""Checkpoints: folders that are either complete or absent, described by one manifest, readable on any mesh.

layout.py               names of folders and files in a save folder
manifest.py             `manifest.json`: every tensor, shard, file, size and SHA-256
validate.py             the checks that every manifest passes before it is used
safetensors_writer.py   writes safetensors files and hashes them on the way
safetensors_reader.py   reads and verifies them
regions.py, reshard.py  which elements of which file fill which elements of a tensor, for any pair of meshes
collective_errors.py    the same error on all ranks
shard_contents.py, shard_manifests.py, save.py, background.py   what each rank writes
commit.py, retention.py renames into place, deletes old checkpoints
find.py, tensor_reader.py, load.py, resume.py   choose, verify and load
"""
