"""Measure time, memory and cost."""
