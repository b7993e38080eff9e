"""Rows: comparisons from files, checked, shared out over hosts, as token batches."""
