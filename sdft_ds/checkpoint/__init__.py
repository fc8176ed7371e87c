"""Atomic checkpoints, resume settings, the lock on output_dir, and preemption."""
