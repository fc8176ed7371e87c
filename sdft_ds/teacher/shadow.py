"""A shadow: other values for the trainable parameters, of which each rank holds its own shard, in fp32.

It is what makes a teacher out of the student's own network: written into the engine for a scoring pass, after which
the student is written back from its fp32 masters. There is no second module, and no copy of the student.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdft_ds import zero
from sdft_ds.config import SDFTConfig
from sdft_ds.teacher.contract import Teacher

# Drift is estimated on this many values of each rank, drawn once: exact norms would need a second shard, the start's.
DRIFT_SAMPLE = 1 << 16


class ShadowTeacher(Teacher):
    """A teacher whose trainable parameters are a shadow that starts as the student does."""

    has_state = True

    def __init__(self, model: nn.Module, args: SDFTConfig):
        super().__init__(model, args)
        self.values: dict[str, Tensor] = {}  # name -> fp32, this rank's piece
        self.sample: dict[str, Tensor] = {}  # name -> positions in it that drift is estimated on
        self.sample_start: dict[str, Tensor] = {}  # name -> the student's values there at the start
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.head_differs = head is not None and any(param.requires_grad for param in head.parameters())

    @torch.no_grad()
    def start(self, engine: nn.Module) -> None:
        pieces = zero.pieces(engine, self.trainable)
        local = sum(len(piece.weights) for piece in pieces)
        generator = torch.Generator().manual_seed(self.args.seed)
        for piece in pieces:
            device = "cpu" if self.args.teacher_shadow_device == "cpu" else piece.weights.device
            self.values[piece.name] = piece.values.to(device, torch.float32, copy=True)
            share = max(1, DRIFT_SAMPLE * len(piece.weights) // max(1, local))
            self.sample[piece.name] = torch.randint(len(piece.weights), (share,), generator=generator)
            self.sample_start[piece.name] = self._sampled(piece.name, piece.values)

    @contextmanager
    @torch.no_grad()
    def weights(self, engine: nn.Module) -> Iterator[None]:
        """Swap in, and the student back afterwards: from its masters, or, where the weights are the only copy, by
        exchange (fp32) or from a copy (half precision, which could not hold the shadow)."""
        if not self.values:
            self.start(engine)
        copies = {}
        with zero.rewritten(engine):
            for piece in zero.pieces(engine, self.trainable):
                if piece.master is None and piece.weights.dtype == torch.float32:
                    self._exchange(piece)
                else:
                    if piece.master is None:
                        copies[piece.name] = piece.weights.clone()
                    piece.weights.copy_(self.values[piece.name])
        try:
            yield
        finally:
            with zero.rewritten(engine):
                for piece in zero.pieces(engine, self.trainable):
                    if piece.master is not None:
                        piece.weights.copy_(piece.master)
                    elif piece.name in copies:
                        piece.weights.copy_(copies[piece.name])
                    else:
                        self._exchange(piece)

    def _exchange(self, piece: zero.Piece) -> None:
        student = piece.weights.to(self.values[piece.name].device, copy=True)
        piece.weights.copy_(self.values[piece.name])
        self.values[piece.name] = student

    @torch.no_grad()
    def drift(self, engine: nn.Module) -> tuple[float, float] | None:
        if not self.values:
            return None
        apart, moved = 0.0, 0.0
        for piece in zero.pieces(engine, self.trainable):
            student = self._sampled(piece.name, piece.values)
            scale = len(piece.weights) / len(student)
            teacher = self._sampled(piece.name, self.values[piece.name])
            apart += scale * (teacher - student).square().sum().item()
            moved += scale * (student - self.sample_start[piece.name]).square().sum().item()
        return apart, moved

    def _sampled(self, name: str, values: Tensor) -> Tensor:
        return values[self.sample[name].to(values.device)].float().cpu()

    def state(self) -> dict[str, Tensor]:
        groups = {"values": self.values, "sample": self.sample, "sample_start": self.sample_start}
        return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            group, _, name = key.partition("/")
            getattr(self, group)[name] = tensor
        if self.args.teacher_shadow_device == "device":
            self.values = {name: tensor.to(self.args.device) for name, tensor in self.values.items()}
