"""Teacher interface: a context in which the engine's forward uses the teacher's weights, updates, and state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor, nn

from sdft_ds.config.sdft_config import SDFTConfig


class Teacher(ABC):
    """Base class of teachers.

    trainable: (name, parameter) of all trained parameters, collected once: in `disable_adapter` none requires grad.
    head_differs: whether its LM head can differ from the student's even within one optimizer step.
    has_state: whether a resume needs `state`.
    """

    head_differs = False
    has_state = False

    def __init__(self, model: nn.Module, args: SDFTConfig):
        self.model = model
        self.args = args
        self.trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]

    @abstractmethod
    def weights(self, engine: nn.Module) -> AbstractContextManager[None]:
        """Context in which the engine's forward is the teacher's. All ranks enter and leave it together."""

    def start(self, engine: nn.Module) -> None:
        """Initialize from the engine's weights; called before the first step, unless `load` was called."""

    def after_step(self, engine: nn.Module, step: int) -> None:
        """Called on every rank after optimizer step `step` (from 1)."""

    def drift(self, engine: nn.Module) -> tuple[float, float] | None:
        """This rank's part of (|teacher - student|^2, |student - start|^2), or None if the teacher cannot drift."""
        return None

    def state(self, engine: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
        """This rank's checkpoint state: shards of flat vectors, as (vector name, offset, values)."""
        return iter(())

    def load(self, engine: nn.Module, read: Callable[[str, int, int], Tensor]) -> None:
        """Restore `state` on any number of ranks: read(vector name, offset, numel) returns fp32 values."""
