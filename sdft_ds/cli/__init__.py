"""Command line and files -> settings, tokenizers and data sets."""
