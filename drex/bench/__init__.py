"""Benchmarks of policies: what `drex bench` runs and reports."""
