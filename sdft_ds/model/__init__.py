"""Loading, the LM head, packed inputs and the forward that computes only at completion tokens."""
