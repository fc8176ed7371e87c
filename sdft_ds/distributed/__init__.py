"""Ranks, collectives, process startup and shutdown, and all that depends on DeepSpeed."""
