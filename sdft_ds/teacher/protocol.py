"""What a teacher is: a context in which the engine's forward is the teacher's, and what keeps it up to date."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor, nn

from sdft_ds.config.sdft_config import SDFTConfig


class Teacher(ABC):
    """One kind of teacher of one run.

    trainable: (name, parameter) of all that is trained, taken once: inside `disable_adapter` none requires a gradient.
    head_differs: whether its language-model head can differ from the student's within one optimizer step.
    has_state: whether a resume needs what `state` gives.
    """

    head_differs = False
    has_state = False

    def __init__(self, model: nn.Module, args: SDFTConfig):
        self.model = model
        self.args = args
        self.trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]

    @abstractmethod
    def weights(self, engine: nn.Module) -> AbstractContextManager[None]:
        """Inside, forwards of the engine are the teacher's. Every rank enters and leaves it together."""

    def start(self, engine: nn.Module) -> None:
        """Called with the engine before anything was trained, unless `load` was: the values to start from."""

    def after_step(self, engine: nn.Module, step: int) -> None:
        """Called on every rank after optimizer step `step` (from 1)."""

    def drift(self, engine: nn.Module) -> tuple[float, float] | None:
        """This rank's part of (|teacher - student|^2, |student - start|^2), or None where the teacher cannot drift."""
        return None

    def state(self, engine: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
        """What this rank must save to go on as it was: pieces of flat vectors, as (vector, offset, values)."""
        return iter(())

    def load(self, engine: nn.Module, read: Callable[[str, int, int], Tensor]) -> None:
        """Take up what `state` gave, on as many ranks or others: read(vector, offset, numel) gives fp32 values."""
