"""Shadow teacher: a weight swap; other values of the trainable parameters, in fp32, each rank holding its own shard.

The shadow turns the student's network into the teacher: it is written into the engine for a scoring pass, then the
student is restored from its fp32 masters. There is no second module and no copy of the student.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import zero
from sdft_ds.teacher.protocol import Teacher

# Drift is estimated on this many values, sampled once: exact norms would need a second shard for the initial values.
DRIFT_SAMPLE = 1 << 16


class ShadowTeacher(Teacher):
    """A teacher whose trainable parameters are a shadow initialized from the student."""

    has_state = True

    def __init__(self, model: nn.Module, args: SDFTConfig):
        super().__init__(model, args)
        self.values: dict[str, Tensor] = {}  # name -> this rank's shard, fp32
        self.sample = self._draw_sample()  # name -> flat indices into the full parameter, for drift
        self.sample_start: dict[str, Tensor] = {}  # name -> initial values at those in this rank's shard
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.head_differs = head is not None and any(param.requires_grad for param in head.parameters())

    def _draw_sample(self) -> dict[str, Tensor]:
        sizes = {name: zero.full_shape(param).numel() for name, param in self.trainable}
        generator = torch.Generator().manual_seed(self.args.seed)
        return {
            name: torch.randint(
                size, (max(1, DRIFT_SAMPLE * size // sum(sizes.values())),), generator=generator
            ).sort()[0]
            for name, size in sizes.items()
        }

    @torch.no_grad()
    def start(self, engine: nn.Module) -> None:
        self.values, self.sample_start = {}, {}
        for piece in zero.local_shards(engine, self.trainable):
            self.values[piece.name] = piece.values.to(self._device(piece), torch.float32, copy=True)
            self.sample_start[piece.name] = self._sampled(piece, piece.values)

    def _device(self, piece: zero.LocalShard) -> torch.device:
        return torch.device("cpu") if self.args.teacher_shadow_device == "cpu" else piece.weights.device

    @contextmanager
    @torch.no_grad()
    def weights(self, engine: nn.Module) -> Iterator[None]:
        """Swap the shadow in, and afterwards the student back: from its masters, or, where the weights are the only
        copy, by exchanging values (fp32) or from a copy (half precision, which cannot hold the shadow exactly)."""
        if not self.values:
            self.start(engine)
        copies, exchanged = {}, set()
        try:
            with zero.publish_shards(engine):
                for piece in zero.local_shards(engine, self.trainable):
                    if piece.master is None and piece.weights.dtype == torch.float32:
                        self._exchange(piece)
                        exchanged.add(piece.name)
                    else:
                        if piece.master is None:
                            copies[piece.name] = piece.weights.clone()
                        piece.write(self.values[piece.name])
            yield
        finally:
            with zero.publish_shards(engine):
                for piece in zero.local_shards(engine, self.trainable):
                    if piece.master is not None:
                        piece.write(piece.master)
                    elif piece.name in copies:
                        piece.write(copies[piece.name])
                    elif piece.name in exchanged:
                        self._exchange(piece)

    def _exchange(self, piece: zero.LocalShard) -> None:
        student = piece.weights.to(self.values[piece.name].device, copy=True)
        piece.write(self.values[piece.name])
        self.values[piece.name] = student

    @torch.no_grad()
    def drift(self, engine: nn.Module) -> tuple[float, float] | None:
        if not self.values:
            return None
        apart, moved = 0.0, 0.0
        shapes = {name: zero.full_shape(param).numel() for name, param in self.trainable}
        for piece in zero.local_shards(engine, self.trainable):
            student = self._sampled(piece, piece.values)
            scale = shapes[piece.name] / len(self.sample[piece.name])
            teacher = self._sampled(piece, self.values[piece.name])
            apart += scale * (teacher - student).square().sum().item()
            moved += scale * (student - self.sample_start[piece.name]).square().sum().item()
        return apart, moved

    def _part_of_sample(self, piece: zero.LocalShard) -> tuple[int, int]:
        """Range (first, last + 1) of the sampled indices, which are sorted, that fall into this shard."""
        ends = torch.tensor([piece.offset, piece.offset + len(piece.weights)])
        first, last = torch.searchsorted(self.sample[piece.name], ends).tolist()
        return first, last

    def _sampled(self, piece: zero.LocalShard, values: Tensor) -> Tensor:
        first, last = self._part_of_sample(piece)
        positions = self.sample[piece.name][first:last] - piece.offset
        return values[positions.to(values.device)].float().cpu()

    def state(self, engine: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
        for piece in zero.local_shards(engine, self.trainable):
            yield f"values/{piece.name}", piece.offset, self.values[piece.name]
            yield f"start/{piece.name}", self._part_of_sample(piece)[0], self.sample_start[piece.name]

    def load(self, engine: nn.Module, read: Callable[[str, int, int], Tensor]) -> None:
        for piece in zero.local_shards(engine, self.trainable):
            values = read(f"values/{piece.name}", piece.offset, len(piece.weights))
            self.values[piece.name] = values.to(self._device(piece))
            first, last = self._part_of_sample(piece)
            self.sample_start[piece.name] = read(f"start/{piece.name}", first, last - first)
