"""The parts of `gpu_suite.py`: what each measures, and the bench that they share."""
