"""Measurements that are too long for a test; `make bench` runs them and prints what docs/benchmarks.md holds."""
