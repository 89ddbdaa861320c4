"""The parts of `tools/bench/gpu_kit.py`: a module each, with one function `run(part)`."""
