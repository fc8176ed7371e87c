"""Live teacher: the student's current weights at the time the generation batch is scored."""

from contextlib import nullcontext

from torch import nn

from sdft_ds.teacher.protocol import Teacher


class Live(Teacher):
    def weights(self, engine: nn.Module) -> nullcontext:
        return nullcontext()
