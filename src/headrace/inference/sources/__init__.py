"""Where checkpoints come from: a directory, what is on this disk, the hub."""
