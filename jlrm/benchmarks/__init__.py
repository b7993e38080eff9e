"""Benchmarks of judges: readers, official scoring rules, and one table of their policies."""
