"""How a judge is trained: stages, their programs, rollouts, rewards and held-out evaluation."""
