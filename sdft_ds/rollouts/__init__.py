"""Completions sampled from the model in training."""
