"""Bytes on the move: checkpoint extents, direct reads, slots, devices, the stream."""
