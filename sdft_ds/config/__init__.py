"""SDFTConfig, its validation and its recipes."""
