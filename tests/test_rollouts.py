import pytest
import torch
from transformers import GenerationConfig

from sdft_ds.rollouts import Draws, Sampler
from tests import tiny


class AsItIs:
    """The context of weights where nothing has to be gathered."""

    def __enter__(self):
        return False

    def __exit__(self, *error):
        return None


OPTIONS = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
           "disable_compile": True}  # fmt: skip
EOS, PAD = 256, 257


def sample(model, prompts, keys, **options):
    return Sampler({**OPTIONS, **options}, [EOS], PAD, seed=1).sample(model, prompts, keys, AsItIs())


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding():
    model = tiny.llama()
    prompts, keys = [[1, 2, 3], [4] * 9, [5, 6]], ["a", "b", "c"]
    together = sample(model, prompts, keys)
    alone = [sample(model, [prompt], [key])[0] for prompt, key in zip(prompts, keys, strict=True)]
    assert together == alone
    assert sample(model, prompts, ["d", "e", "f"]) != together


def test_greedy_equals_generate():
    model = tiny.llama().eval()
    prompts = [[1, 2, 3], [7, 8, 9]]
    expected = model.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=8, eos_token_id=EOS,
                              pad_token_id=PAD)[:, 3:].tolist()  # fmt: skip
    got = sample(model, prompts, ["a", "b"], do_sample=False)
    assert [c.ids for c in got] == [row[: row.index(EOS) + 1] if EOS in row else row for row in expected]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"typical_p": 0.5}]
)
def test_samples_follow_the_distribution_that_generate_samples_from(options):
    """Chi-square of 4,000 first tokens against the probabilities after transformers' own warpers."""
    model, prompt, n = tiny.llama(seed=2).eval(), [1, 2, 3], 4000
    settings = {**OPTIONS, **options, "max_new_tokens": 1}
    output = model.generate(
        torch.tensor([prompt]), pad_token_id=PAD, output_scores=True, return_dict_in_generate=True, **settings
    )
    probabilities = output.scores[0][0].softmax(-1)
    tokens = torch.tensor([c.ids[0] for c in sample(model, [prompt] * n, [str(i) for i in range(n)], **settings)])
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * n
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    cells = [(counts[large], expected[large])]
    rest = (counts[~large].sum().view(1), expected[~large].sum().view(1))
    if rest[1] >= 5:
        cells.append(rest)
    statistic = sum(((c - e) ** 2 / e).sum() for c, e in cells)
    freedom = max(1, sum(len(e) for _, e in cells) - 1)
    # Mean `freedom`, standard deviation sqrt(2 freedom): five of them is one false alarm in a million.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_draws_are_a_function_of_key_and_position_only():
    device = torch.device("cpu")
    assert torch.equal(Draws(["a", "b"], 9, device).table_RC[0], Draws(["x", "a"], 20, device).table_RC[1, :9])
    table = Draws(["a", "b"], 5, device).table_RC
    assert len(set(table.flatten().tolist())) == 10 and 0 <= table.min() and table.max() < 1


def test_a_token_without_probability_is_never_chosen():
    scores = torch.full((1, 6), float("-inf"))
    scores[0, [1, 4]] = 0.0
    draws = Draws(["a"], 1, scores.device)
    for number, token in ((0.0, 1), (0.499, 1), (0.501, 4), (1 - 2.0**-53, 4)):
        draws.table_RC[0, 0] = number
        assert draws.choose(scores, torch.tensor([0]), 0).tolist() == [token]


def test_the_models_own_sampling_settings_do_not_leak_in():
    model = tiny.llama()
    plain = sample(model, [[1, 2, 3]], ["a"])
    model.generation_config = GenerationConfig(min_p=0.99, typical_p=0.01, suppress_tokens=list(range(200)))
    assert sample(model, [[1, 2, 3]], ["a"]) == plain
    assert model.generation_config.min_p == 0.99


def test_everything_is_restored_after_an_exception():
    model = tiny.llama()
    model.train()
    own = model.generation_config
    with pytest.raises(IndexError):
        sample(model, [[100_000]], ["a"])
    assert model.training and model.generation_config is own


def test_too_few_outputs_are_an_error():
    model = tiny.llama()
    whole = model.generate
    model.generate = lambda *args, **kwargs: whole(*args, **kwargs)[:1]
    with pytest.raises(RuntimeError, match="1 completions for 2 prompts"):
        sample(model, [[1], [2]], ["a", "b"])


def test_beams_are_refused():
    with pytest.raises(ValueError, match="num_beams"):
        Sampler({**OPTIONS, "num_beams": 2}, [EOS], PAD, seed=1)


def test_continuous_batching_is_greedy_where_generate_is():
    model = tiny.llama()
    prompts = [[1, 2, 3], [4] * 9, [5, 6], [1, 2, 3]]
    continuous = Sampler({**OPTIONS, "do_sample": False}, [EOS], PAD, 1, "continuous")
    got = continuous.sample(model, prompts, list("abcd"), AsItIs())
    assert got == sample(model, prompts, list("abcd"), do_sample=False)


def test_continuous_batching_samples_from_the_same_distribution():
    model, prompt, n = tiny.llama(seed=2).eval(), [1, 2, 3], 2000
    options = {**OPTIONS, "max_new_tokens": 1, "top_k": 8, "temperature": 0.8}
    sampler = Sampler(options, [EOS], PAD, 1, "continuous")
    tokens = torch.tensor([c.ids[0] for c in sampler.sample(model, [prompt] * n, ["a"] * n, AsItIs())])
    top = (model(torch.tensor([prompt])).logits[0, -1] / 0.8).topk(8)
    expected = torch.zeros(264, dtype=torch.float64).scatter(0, top.indices, top.values.double().softmax(-1)) * n
    counts = torch.bincount(tokens, minlength=264).double()
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[top.indices] ** 2 / expected[top.indices]).sum()
    assert statistic < 7 + 5 * 14**0.5 + 10


def test_continuous_batching_leaves_the_model_and_the_generators_as_they_were():
    model = tiny.llama().train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    attention = model.config._attn_implementation
    Sampler(OPTIONS, [EOS], PAD, 1, "continuous").sample(model, [[1, 2]], ["a"], AsItIs())
    assert torch.equal(torch.rand(1), expected)
    assert model.training and model.config._attn_implementation == attention


def test_a_row_that_is_finished_leaves_the_batch(monkeypatch):
    model = tiny.llama()
    widths, inner = [], model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: (widths.append(len(k["input_ids"])), inner(*a, **k))[1]
    )
    prompts = [[1, 2, 3]] * 6 + [[4, 5]] * 2
    made = sample(model, prompts, list("abcdefgh"), max_new_tokens=200)
    lengths = sorted((len(completion.ids) for completion in made), reverse=True)
    assert widths[0] == 2  # each prompt once
    assert widths[1:] == [sum(length > position for length in lengths) for position in range(1, lengths[0])]
    assert widths[1] == 8 > widths[-1]
