"""Reinforcement learning as arithmetic: log-probabilities, advantages and losses on plain arrays."""
