"""The divergence between student and teacher, in chunks, normalized over all ranks."""
