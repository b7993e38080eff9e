"""Where weights lie: Orbax checkpoints, the Hugging Face format, named shapes."""
