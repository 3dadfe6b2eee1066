"""Data: read, check, split, render and encode what a run learns from."""
