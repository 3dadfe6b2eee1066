"""Adapters: choose what trains, inject it, save it, load it, merge it."""
