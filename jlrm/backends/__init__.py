"""Judges that can be asked: each module makes a `Backend` (benchmarks/games.py)."""
