"""Everything that knows about ranks, collectives and DeepSpeed."""
