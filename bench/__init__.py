"""Timings and bounds of every op in the registry."""
