"""Measurements of fastmeta: `python -m benchmarks`, and `pytest benchmarks --benchmark-enable`."""
