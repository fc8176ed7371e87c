"""Checks whether this machine can train."""
