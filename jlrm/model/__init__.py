"""Qwen-style decoders: architecture, attention, named shapes and the Hugging Face format."""
