"""A stage's recipe each, and the table of all stages."""
