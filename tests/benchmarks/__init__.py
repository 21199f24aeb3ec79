"""Benchmarks: speed is measured here and never decides a test. `python -m tests.benchmarks --help` lists them."""
