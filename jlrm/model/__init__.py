"""Qwen-style decoders: the architecture and attention over packed rows."""
