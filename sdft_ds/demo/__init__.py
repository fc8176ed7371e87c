"""The embedded demo: a toy world that trains on a CPU, a model that knows part of it, and the SFT baseline."""
