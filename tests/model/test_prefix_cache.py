import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from sdft_ds.data.batch import pad_left
from sdft_ds.model import prefix_cache

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8}  # fmt: skip
ATTENTION = {
    "qwen3": Qwen3Config(**SMALL),
    "mistral (window of 4)": MistralConfig(**SMALL, sliding_window=4),
    "gemma3 (window of 4 in some layers)": Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2 (learned positions)": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1),
}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("config", ATTENTION.values(), ids=ATTENTION.keys())
@torch.no_grad()
def test_what_follows_a_shared_prompt_is_what_follows_it_in_a_row_of_its_own(config):
    model = model_of(config)
    assert prefix_cache.supports_prefixes(model)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 11], [3, 4]]
    followers = [[20, 21, 22], [30, 31, 32], [40, 41, 42]]
    first, rows = prefix_cache.distinct(prompts)
    assert (first, rows) == ([0, 2], [0, 0, 1])
    ids, mask = pad_left([prompts[r] for r in first], 0, torch.device("cpu"))
    cache = prefix_cache.empty_cache(model)
    model(**prefix_cache.prompt_inputs(ids, mask, padded=True), past_key_values=cache, use_cache=True)
    prefix_cache.fan_out(cache, torch.tensor(rows), room=3)
    parts = [
        model(
            **prefix_cache.next_inputs(torch.tensor([f[a:b] for f in followers]), mask[rows], a, padded=True),
            past_key_values=cache,
            use_cache=True,
        ).logits
        for a, b in ((0, 2), (2, 3))
    ]
    for r, (prompt, follower) in enumerate(zip(prompts, followers, strict=True)):
        alone = model(torch.tensor([prompt + follower])).logits[0, -3:]
        torch.testing.assert_close(torch.cat(parts, dim=1)[r], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ATTENTION.values(), ids=ATTENTION.keys())
@torch.no_grad()
def test_rows_can_leave(config):
    model = model_of(config)
    cache = prefix_cache.empty_cache(model)
    model(torch.tensor([[1, 2, 3], [4, 5, 6]]), past_key_values=cache, use_cache=True)
    prefix_cache.fan_out(cache, torch.tensor([0, 1, 1, 0, 1]), room=5)
    rows = [[1, 2, 3, 7], [4, 5, 6, 8], [4, 5, 6, 9], [1, 2, 3, 10], [4, 5, 6, 11]]
    model(torch.tensor(rows)[:, -1:], past_key_values=cache, use_cache=True)
    for finished in ([True, False, False, True, False], [False, True, False], [False, False], [True, False]):
        kept = prefix_cache.without(finished)
        prefix_cache.keep_rows(cache, kept)
        rows = [[*rows[row], 12] for row in kept]
        last = model(torch.tensor(rows)[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(last, model(torch.tensor(rows)).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert rows == [[4, 5, 6, 9, 12, 12, 12, 12]]
    prefix_cache.keep_rows(cache, prefix_cache.without([True]))
    assert cache.layers[0].keys.shape[0] == 0


def test_a_row_that_leaves_has_one_row_copied():
    layer = type("Filled", (), {"dtype": torch.float32, "device": torch.device("cpu"), "keys": torch.rand(2, 1, 3, 4)})
    layer.values = layer.keys + 1
    cache = DynamicCache()
    cache.layers = [prefix_cache.RoomyLayer(layer, torch.arange(2).repeat(4), room=2)]
    room, before = cache.layers[0].room_keys, cache.layers[0].keys.clone()
    rows = prefix_cache.without([False, False, True, False, False, False, False, False])
    assert rows == [0, 1, 7, 3, 4, 5, 6]
    prefix_cache.keep_rows(cache, rows)
    assert torch.equal(cache.layers[0].keys, before[rows]) and cache.layers[0].keys.data_ptr() == room.data_ptr()
    assert prefix_cache.without([True, True]) == []


@pytest.mark.parametrize("seed", range(20))
def test_rows_stay_in_their_places_but_the_last_ones(seed):
    draw = random.Random(seed)
    finished = [draw.random() < 0.4 for _ in range(draw.randint(1, 12))]
    rows = prefix_cache.without(finished)
    assert sorted(rows) == [row for row, ends in enumerate(finished) if not ends]
    assert all(row == place or (finished[place] and row >= len(rows)) for place, row in enumerate(rows))


def test_recurrent_layers_do_not_share_prefixes():
    recurrent = {name: value for name, value in SMALL.items() if name in ("vocab_size", "hidden_size")}
    assert not prefix_cache.supports_prefixes(model_of(MambaConfig(**recurrent, num_hidden_layers=2, state_size=4)))
    hybrid = FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    assert not prefix_cache.supports_prefixes(model_of(hybrid))
    linear = Qwen3NextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    assert not prefix_cache.supports_prefixes(model_of(linear))


@pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 10_000), marks=pytest.mark.full)])
def test_batches_hold_every_row_once_and_are_within_the_budget(seeds):
    for seed in seeds:
        check_batches(random.Random(seed))


def check_batches(draw):
    prompts = [
        [1] * length for _ in range(draw.randint(0, 8)) for length in [draw.randint(1, 40)] * draw.randint(1, 5)
    ]
    draw.shuffle(prompts)
    sizes = [len(prompt) + draw.choice((0, 8, draw.randint(0, 8))) for prompt in prompts]
    budget = draw.randint(1, 200)
    batches = prefix_cache.batches_within(budget, sizes, prompts)
    assert sorted(row for batch in batches for row in batch) == list(range(len(prompts)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sizes[row] for row in batch) <= budget
    for prompt in {tuple(prompt) for prompt in prompts}:
        rows = [row for row, other in enumerate(prompts) if tuple(other) == prompt]
        parts = [batch for batch in batches if set(batch) & set(rows)]
        if len(rows) * max(sizes[row] for row in rows) <= budget:
            assert len(parts) == 1  # computed once
        else:
            assert len(parts) == -(-len(rows) // max(1, budget // max(sizes[row] for row in rows)))


@pytest.mark.parametrize("config", ATTENTION.values(), ids=ATTENTION.keys())
@pytest.mark.parametrize("length", [3, 9])
def test_the_size_of_a_cache_is_that_of_its_keys_and_values(config, length):
    cache = prefix_cache.empty_cache(model := model_of(config))
    model(torch.arange(length).unsqueeze(0) + 5, past_key_values=cache, use_cache=True)
    shape, held = (
        prefix_cache.CacheShape.of(config),
        sum(each.keys.numel() + each.values.numel() for each in cache.layers),
    )
    windows = len([window for window in shape.windows if window is not None and window <= length])
    # A layer with a window keeps a token less, as long as no token is added.
    assert shape.elements(length) == held + 2 * shape.width * windows and not shape.recurrent
    assert 2 * shape.width == 2 * cache.layers[0].keys[:, :, 0].numel()


def test_the_size_of_a_cache_counts_states_and_windows():
    linear = Qwen3NextConfig(**SMALL, layer_types=["linear_attention", "full_attention"])
    both = FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    shapes = [
        prefix_cache.CacheShape.of(config)
        for config in (linear, both, ATTENTION["gemma3 (window of 4 in some layers)"])
    ]
    assert [shape.recurrent for shape in shapes] == [1, 2, 0]
    assert [shape.windows for shape in shapes] == [(None,), (None, None), (4, None)]
    assert shapes[0].elements(5000) == 2 * 16 * (5000 + prefix_cache.STATE_TOKENS)
    assert shapes[2].elements(5000) == 2 * 16 * (5000 + 4)
