"""Floor three, transformers models whose blocks stream."""
