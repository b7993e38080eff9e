"""Which runs answer a question? What a study holds, what is still to do, and its tables."""
