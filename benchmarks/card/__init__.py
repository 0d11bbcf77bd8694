"""The parts of benchmarks/gpu.py: each a `run(record, args)` that adds its rows to the record."""
