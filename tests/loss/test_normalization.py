import pytest
import torch

from sdft_ds.data.batch import LossMask, collate
from sdft_ds.loss.normalization import loss_weights
from tests.data.test_batch import CPU, PAD, rollout

# Two micro-batches; completions with 2, 3, 0 (empty) and 1 loss tokens.
BATCHES = [
    [rollout([1], [2], [11, 12]), rollout([1], [2], [13, 14, 15])],
    [rollout([1], [2], [16]), rollout([1], [2], [17], truncated=True)],
]
LOSSES = [torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([6.0])]
EXPECTED = {
    "dapo": 21 / 6,
    "grpo": (1.5 + 4.0 + 0.0 + 6.0) / 4,
    "bnpo": (15 / 5 + 6 / 1) / 2,
    "dr_grpo": 21 / (4 * 10),
}


def total(batches, losses, loss_type, world_size=1, all_reduce=lambda tensor: tensor):
    of_step = loss_weights(batches, loss_type, 10, world_size, all_reduce)
    return sum(
        (share.scale * (share.weights_N * loss).sum()).item() for share, loss in zip(of_step, losses, strict=True)
    )


@pytest.mark.parametrize("loss_type", EXPECTED)
def test_by_hand(loss_type):
    batches = [collate(rollouts, LossMask(), PAD, CPU) for rollouts in BATCHES]
    assert total(batches, LOSSES, loss_type) == pytest.approx(EXPECTED[loss_type])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_two_ranks_average_to_the_same(loss_type):
    """Each rank holds one of the micro-batches; gradients, like losses here, are averaged over ranks."""
    batches = [collate(rollouts, LossMask(), PAD, CPU) for rollouts in BATCHES]
    both = torch.tensor([6.0, 4.0], dtype=torch.float64)  # loss tokens and completions of both ranks
    values = [
        total([batch], [loss], loss_type, world_size=2, all_reduce=lambda tensor: both)
        for batch, loss in zip(batches, LOSSES, strict=True)
    ]
    assert sum(values) / 2 == pytest.approx(EXPECTED[loss_type])


@pytest.mark.parametrize("loss_type", EXPECTED)
def test_without_loss_tokens_the_scale_is_finite(loss_type):
    batches = [collate([rollout([1], [2], [11])], LossMask(), PAD, CPU)]
    (share,) = loss_weights(batches, loss_type, 10, 1, lambda tensor: tensor)
    assert share.scale.isfinite() and share.weights_N.shape == (0,)
