"""Comparisons from files, as token batches addressed by step."""
