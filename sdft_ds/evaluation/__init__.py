"""Questions before, while and after training: what a model learned and what it forgot."""
