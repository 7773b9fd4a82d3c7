"""Reinforcement learning on rewards that can be verified."""
