"""What a teacher is: a context in which the engine's forward is the teacher's."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import nn


class Teacher(ABC):
    """head_differs: whether the values of its language-model head can differ from the student's in the same step."""

    head_differs = False

    def __init__(self, model: nn.Module):
        self.model = model

    @abstractmethod
    def weights(self, engine: nn.Module) -> AbstractContextManager[None]:
        """Inside, forwards of the engine are the teacher's. Every rank enters and leaves it together."""
