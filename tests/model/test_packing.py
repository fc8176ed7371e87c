import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MambaConfig

from sdft_ds.data.batch import pack_rows
from sdft_ds.model.packing import Packing, first_fit, packing_for
from tests.helpers import tiny

CPU = torch.device("cpu")


def test_first_fit_fills_lines_as_long_as_the_longest_row():
    assert first_fit([3, 10, 4, 6, 2]) == [[1], [3, 2], [0, 4]]
    assert first_fit([5, 5]) == [[0], [1]]


def test_rows_share_lines_where_it_costs_less_than_padding():
    skewed, even = [100, 10, 12, 9, 11, 8], [50, 50, 49, 48]
    assert Packing(None, linear=1.0).bins_of(skewed) == [[0], [2, 4, 1, 3, 5]]
    assert Packing(None, linear=1.0).bins_of(even) == [[0], [1], [2], [3]]
    # Where attention is all the work, a masked line costs twice a causal one: 2 x 2 lines against 3 rows.
    assert Packing(None, linear=0.0, quadratic=1.0).bins_of([100, 30, 30]) == [[0], [1], [2]]
    # Two lines cost less than six rows, unless a mask costs several times its FLOPs.
    assert Packing(None, linear=10.0, quadratic=1.0).bins_of(skewed) == [[0], [2, 4, 1, 3, 5]]
    assert Packing(None, linear=10.0, quadratic=1.0, mask_cost=4.0).bins_of(skewed) == [[i] for i in range(6)]
    assert Packing(None, varlen=True).bins_of(even) == [[0, 1, 2, 3]]
    assert Packing(False, varlen=True).bins_of(even) == [[0], [1], [2], [3]]
    assert Packing(True, quadratic=1e9).bins_of([100, 30, 30]) == [[0], [1, 2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_do_not_see_each_other(attention, window):
    """Hidden states and gradients are those of padded rows, with a sliding window as without."""
    if window:
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=window,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny.llama().eval()
    model.set_attn_implementation(attention)
    rows, counts = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31], [40, 41, 42]], [3, 1, 1, 2]
    found = []
    for packing in (Packing(False), Packing(True)):
        view = pack_rows(rows, counts, packing.bins_of(list(map(len, rows))), 0, CPU)
        states = model.base_model(**view.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[view.positions_N]
        model.zero_grad()
        states.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((states.detach(), grads, view.input_ids_LT.shape[0]))
    (plain, plain_grads, lines), (packed, packed_grads, packed_lines) = found
    assert packed_lines == 2 < lines == 4
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)
    assert (packed_grads - plain_grads).norm() <= 1e-5 * plain_grads.norm()


def test_recurrent_layers_are_never_packed():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    assert packing_for(model, None, CPU) == Packing(on=False)
    with pytest.raises(ValueError, match="padding_free: MambaForCausalLM"):
        packing_for(model, True, CPU)


def test_the_costs_are_those_of_the_model():
    packing = packing_for(tiny.llama(), None, CPU)
    # 2 layers of attention (32 x 32, 2 x 32 x 16, 32 x 32) and MLP (3 x 32 x 64), and two operations for each weight.
    assert packing == dataclasses.replace(packing, linear=2 * 2 * (32 * 32 * 3 + 3 * 32 * 64), quadratic=4 * 2 * 32)


def test_a_mask_costs_more_on_a_gpu():
    assert packing_for(tiny.llama(), None, CPU).mask_cost == 1.0
    assert packing_for(tiny.llama(), None, torch.device("cuda")).mask_cost == 4.0
