"""Throughput of scoring files, beside the engine's own and beside what people write for it."""
