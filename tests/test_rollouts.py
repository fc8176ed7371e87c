import pytest
import torch
from transformers import GenerationConfig

from sdft_ds.rollouts import RaceNoise, Sampler
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


def test_noise_is_a_function_of_key_and_position_only():
    scores = torch.zeros(2, 50)
    at = lambda keys, position: RaceNoise(keys, 3, scores.device)(torch.zeros(2, 3 + position), scores)  # noqa: E731
    torch.testing.assert_close(at(["a", "b"], 4)[0], at(["x", "a"], 4)[1])
    assert not torch.equal(at(["a", "b"], 4), at(["a", "b"], 5))
    assert at(["a", "b"], 0).isfinite().all()


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
