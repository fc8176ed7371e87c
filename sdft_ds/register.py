"""Registers custom teachers, divergences and rollout backends by name; see docs/extending.md."""

from sdft_ds import teacher as _teacher
from sdft_ds.loss.divergence import MODES, Divergence
from sdft_ds.rollouts import sampler as _sampler
from sdft_ds.rollouts.sampler import Backend
from sdft_ds.teacher import Maker


def teacher(name: str, full: Maker, adapter: Maker | None = None) -> None:
    """Register `name` for teacher_model_kind. full, adapter: (model, settings) -> Teacher, for full fine-tuning and
    for a PEFT model, if it differs."""
    _teacher.add_kind(name, full, adapter)


def divergence(name: str, kind: type[Divergence]) -> None:
    """Register `name` for distillation_mode."""
    MODES[name] = kind


def rollout_backend(name: str, backend: Backend) -> None:
    """Register `name` for rollout_backend."""
    _sampler.add_backend(name, backend)
