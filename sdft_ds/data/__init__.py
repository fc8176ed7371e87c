"""From rows of a data set to packed batches of token ids."""
