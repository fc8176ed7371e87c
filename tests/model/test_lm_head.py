"""A copy of a head is what the head was, whichever of its tensors are trained afterwards."""

import pytest
import torch
from torch import nn

from sdft_ds.model.lm_head import tensors_of


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_copy_keeps_what_is_trained_and_shares_the_rest(weight, bias):
    head, hidden = nn.Linear(4, 7), torch.randn(3, 4)
    head.weight.requires_grad_(weight)
    head.bias.requires_grad_(bias)
    tensors, before = tensors_of(head), head(hidden).detach()
    copy = tensors.copied(tensors)
    assert (copy.weight_VD is not None, copy.bias_V is not None) == (weight, bias)
    with torch.no_grad():  # an optimizer step
        for param in head.parameters():
            if param.requires_grad:
                param.add_(1.0)
    teacher = copy.beside(tensors.values())
    torch.testing.assert_close(hidden @ teacher.weight_VD.T + teacher.bias_V, before)
