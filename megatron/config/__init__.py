"""One YAML describes one run: reading, checking and explaining it, without importing torch.

`load.load_config` returns a `schema.RunConfig`: typed, frozen sections. Only this package knows NeoX's flat namespace of keys.
"""
