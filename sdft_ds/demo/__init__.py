"""The embedded demo: a world small enough to learn on a CPU, a model that knows half of it, and the SFT baseline."""
