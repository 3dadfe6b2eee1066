"""Benchmarks: many methods and seeds on one task, measured and compared."""
