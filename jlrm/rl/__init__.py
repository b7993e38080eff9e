"""Reinforcement learning as arithmetic on arrays: log-probabilities, advantages and losses."""
