"""Floor two, bytes on the move: checkpoint extents, direct reads, slots, devices, the stream, the probe."""
