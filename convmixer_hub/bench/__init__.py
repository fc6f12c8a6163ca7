"""Benchmarks: speed, fine-tuning and ablations."""
