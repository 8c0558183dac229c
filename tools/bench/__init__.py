"""Benchmarks that time each hot path beside what people use instead: python -m tools.bench all."""
