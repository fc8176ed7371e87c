"""Rollouts: completions sampled from the model being trained."""
