"""Reinforcement learning of both ways to paint: rewards of the model's own pictures; see README.md."""
