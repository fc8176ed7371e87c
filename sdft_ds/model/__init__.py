"""Model: loading, LM head, packing, KV cache, and a forward that computes only at completion tokens."""
