"""EMA teacher: an exponential moving average of the student.

teacher = (1 - rate) teacher + rate student, every `teacher_sync_steps` optimizer steps, from the fp32 masters and kept
in fp32: at a rate of 0.01, a bf16 average makes at most a tenth of the movement, the rest is lost to rounding. With
LoRA the adapter's factors are averaged.
"""

import torch
from torch import nn

from sdft_ds.distributed import zero
from sdft_ds.teacher.shadow import ShadowTeacher


class Ema(ShadowTeacher):
    @torch.no_grad()
    def after_step(self, engine: nn.Module, step: int) -> None:
        if step % self.args.teacher_sync_steps == 0:
            for piece in zero.local_shards(engine, self.trainable):
                value = self.values[piece.name]
                value.lerp_(piece.values.to(value.device, torch.float32), self.args.teacher_update_rate)
