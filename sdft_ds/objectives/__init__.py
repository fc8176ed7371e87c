"""Training objectives: batch collection and loss, one method per module."""
