"""Data pipeline: from data set rows to packed batches of token ids."""
