"""Benchmarks whose items are joined from rows of raters: votes on pairs, ratings of answers."""
