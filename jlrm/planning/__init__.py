"""Does a run fit, and what does it cost: programs compiled for a TPU slice, counted and drawn."""
