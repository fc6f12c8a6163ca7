"""Benchmarks: speed and fine-tuning."""
