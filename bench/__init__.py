"""Benchmarks of flexsparse: cases, correctness gate, interleaved timing, tables. Run from a checkout, not installed."""
