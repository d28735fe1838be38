"""Benchmarks: each module is a command, prints its figures, and ends with one JSON line."""
