"""Levers that trade time for memory, each a file of its own."""
