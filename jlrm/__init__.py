"""jlrm: train and use reasoning judges in JAX, on one CPU, one TPU chip or many slices."""

__version__ = "0.1.0"
