"""Reinforcement learning: environments, rollouts, rewards, gradients, updates."""
