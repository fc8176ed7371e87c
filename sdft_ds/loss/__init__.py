"""Distillation loss: chunked divergence between student and teacher, normalized across ranks."""
