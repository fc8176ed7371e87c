"""Training loop on transformers' Trainer; the only package that uses its private attributes."""
