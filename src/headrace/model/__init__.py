"""What runs: a model's layers, their bytes and operations, from a config, an index or the catalogue. No torch."""
