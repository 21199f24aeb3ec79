"""Chaos: faults under continuous load, every answer checked. `python -m tests.chaos --help` (or `make chaos`)."""
