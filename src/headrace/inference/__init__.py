"""transformers models whose blocks stream."""
