"""One YAML describes one run: reading, checking and explaining it, without importing torch.

`load.load_config` is the way in, `schema.RunConfig` is what comes out: typed, frozen sections that never change
during a run. The flat namespace of NeoX exists at this edge only.
"""
