"""Task evaluation before, during and after training: what the model learned and what it forgot."""
