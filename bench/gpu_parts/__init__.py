"""The parts of `gpu.py`: what each measures, and the device, the checkpoints and the clock that they share."""
