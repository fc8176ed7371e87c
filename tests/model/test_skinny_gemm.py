import pytest
import torch
from torch import nn

from sdft_ds.model.completion_forward import RequestForward
from sdft_ds.model.skinny_gemm import PLAIN_FORWARD, skinny_gemm
from tests.helpers import tiny


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_the_product_is_the_same(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(rows, 1, 24)
    plain = layer(x)
    with skinny_gemm(layer):
        thin = layer(x)
    torch.testing.assert_close(thin, plain)
    assert thin.is_contiguous() and "forward" not in vars(layer)


def test_autocast_and_half_precision_are_left_alone():
    layer, x = nn.Linear(24, 40), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16), skinny_gemm(layer):
        assert layer(x).dtype == torch.bfloat16
    half = nn.Linear(24, 40).to(torch.bfloat16)
    with skinny_gemm(half):
        assert torch.equal(half(x.bfloat16()), nn.functional.linear(x.bfloat16(), half.weight, half.bias))


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x * 0 + 7
    with pytest.raises(KeyError), skinny_gemm(layer):
        assert layer(torch.ones(2, 4)).unique().tolist() == [7.0]
        raise KeyError
    assert layer(torch.ones(2, 4)).unique().tolist() == [7.0]


def test_a_head_that_answers_requests_is_fast_too():
    model = tiny.llama()
    with RequestForward(model):
        installed, plain = model.lm_head.forward, getattr(model.lm_head, PLAIN_FORWARD)
        with skinny_gemm(model):
            assert getattr(model.lm_head, PLAIN_FORWARD) is not plain
            torch.testing.assert_close(model.lm_head(torch.ones(3, 32)), plain(torch.ones(3, 32)))
        assert model.lm_head.forward == installed and getattr(model.lm_head, PLAIN_FORWARD) == plain
    assert "forward" not in vars(model.lm_head)
