import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    masking_utils,
)

from sdft_ds.model import prefix_cache
from sdft_ds.rollouts import decode as decoding
from sdft_ds.rollouts import sampler
from sdft_ds.rollouts.draws import Draws, NonFiniteLogits
from sdft_ds.rollouts.engine import Sampling
from sdft_ds.rollouts.sampler import Sampler
from tests.helpers import tiny
from tests.helpers.host_syncs import HostSyncs


class AsItIs:
    """The context of weights where nothing has to be gathered."""

    def __enter__(self):
        return False

    def __exit__(self, *error):
        return None


OPTIONS = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
           "disable_compile": True}  # fmt: skip
EOS, PAD = 256, 257


def sample(model, prompts, keys, batch_tokens=None, backend="generate", **options):
    sampler = Sampler(Sampling({**OPTIONS, **options}, [EOS], PAD, 1), backend, batch_tokens)
    return sampler.sample(model, prompts, keys, AsItIs())


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


@pytest.mark.parametrize("backend", ["generate", "continuous"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"temperature": 0.5}, {"top_p": 0.6}])
def test_each_token_has_the_log_probability_of_the_model_at_its_temperature(backend, options):
    if backend == "continuous" and "cache_implementation" in options:
        pytest.skip("has a cache of its own")
    model, prompts = tiny.llama().eval(), [[1, 2, 3], [4] * 9]
    completions = sample(model, prompts, ["a", "b"], backend=backend, **options)
    for prompt, completion in zip(prompts, completions, strict=True):
        if backend == "continuous" and "top_p" in options:
            assert completion.log_probs is None  # known after top-p only
            continue
        logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / options.get("temperature", 1.0)).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(completion.ids).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=0)


def test_greedy_log_probabilities_are_unknown_at_another_temperature():
    (completion,) = sample(tiny.llama(), [[1, 2]], ["a"], do_sample=False, temperature=0.5)
    assert completion.log_probs is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_beams": 2}, "num_beams cannot be set: rollouts sample one completion"),
        ({"eos_token_id": 3}, "eos_token_id cannot be set: it is that of the model"),
        ({"stop_strings": ["x"]}, "stop_strings cannot be set: it works on text"),
        ({"penalty_alpha": 0.5}, "penalty_alpha cannot be set: rollouts sample token by token"),
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"min_length": "a"}, "min_length cannot be a text, 'a'"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_options_that_rollouts_cannot_have_are_refused(options, words):
    with pytest.raises(ValueError, match=f"generation_kwargs: .*{words}"):
        Sampler(Sampling({**OPTIONS, **options}, [EOS], PAD, seed=1))


@pytest.mark.parametrize("option", [{"encoder_no_repeat_ngram_size": 2}, {"encoder_repetition_penalty": 1.5}])
def test_options_that_remember_the_prompts_of_their_rows_work_when_rows_end(option):
    prompts, keys, model = [[1, 2, 3], [4, 5, 6, 7], [8, 9]], list("abc"), tiny.llama()
    option = {**option, "do_sample": False}
    first, *others = (each.ids for each in sample(model, prompts, keys, **option))
    end = next(token for token in first[1:] if not any(token in ids for ids in others))

    def ended(prompts, keys):
        sampler = Sampler(Sampling({**OPTIONS, **option}, [end], PAD, 1), "generate")
        return [each.ids for each in sampler.sample(model, prompts, keys, AsItIs())]

    together = ended(prompts, keys)
    assert len(together[0]) < len(together[1])
    assert together == [ended([prompt], [key])[0] for prompt, key in zip(prompts, keys, strict=True)]


def test_a_model_without_logits_to_keep_is_sampled_from():
    class Older(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                    **others):  # fmt: skip
            assert not others.pop("logits_to_keep", 0)
            return super().forward(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                use_cache=use_cache, **others,
            )  # fmt: skip

        def _supports_logits_to_keep(self):
            return False

    model = tiny.llama()
    older = Older(model.config).eval()
    older.load_state_dict(model.state_dict())
    prompts, keys = [[1, 2, 3], [4, 5]], ["a", "b"]
    assert [e.ids for e in sample(older, prompts, keys)] == [e.ids for e in sample(model, prompts, keys)]


def test_continuous_batching_is_greedy_where_generate_is():
    model = tiny.llama()
    prompts = [[1, 2, 3], [4] * 9, [5, 6], [1, 2, 3]]
    continuous = Sampler(Sampling({**OPTIONS, "do_sample": False}, [EOS], PAD, 1), "continuous")
    got = continuous.sample(model, prompts, list("abcd"), AsItIs())
    assert got == sample(model, prompts, list("abcd"), do_sample=False)


def test_continuous_batching_samples_from_the_same_distribution():
    model, prompt, n = tiny.llama(seed=2).eval(), [1, 2, 3], 2000
    options = {**OPTIONS, "max_new_tokens": 1, "top_k": 8, "temperature": 0.8}
    sampler = Sampler(Sampling(options, [EOS], PAD, 1), "continuous")
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
    Sampler(Sampling(OPTIONS, [EOS], PAD, 1), "continuous").sample(model, [[1, 2]], ["a"], AsItIs())
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


SHARED = [[1, 2, 3]] * 3 + [[4, 5]] * 2 + [[6] * 20] + [[1, 2, 3]]  # rows of one prompt need not be neighbours


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"cache_implementation": "static"}])
def test_rows_that_do_not_fit_are_generated_in_several_calls_with_the_same_draws(monkeypatch, options):
    model, keys = tiny.llama(), list("abcdefg")
    whole = sample(model, SHARED, keys, **options)
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **k: (calls.append(ids.tolist()), generate(ids, **k))[1])
    for budget in (1, 44, 60, 10_000):
        calls.clear()
        assert sample(model, SHARED, keys, batch_tokens=budget, **options) == whole
        assert sum(map(len, calls)) == len(SHARED)
        for rows in calls:
            assert len(rows) == 1 or len(rows) * (len(rows[0]) + OPTIONS["max_new_tokens"]) <= budget
        assert {1: 7, 44: 3, 60: 3, 10_000: 1}[budget] == len(calls)
    assert calls[0] == [[PAD] * (20 - len(prompt)) + prompt for prompt in SHARED]  # one call takes rows as they come


def test_without_a_setting_memory_decides(monkeypatch):
    model, keys = tiny.llama(), list("abcdefg")
    whole, calls, decode = sample(model, SHARED, keys), [], decoding.decode_rows
    monkeypatch.setattr(decoding, "decode_rows", lambda *a: (calls.append(a[1].shape), decode(*a))[1])
    of_row = sampler._bytes_of_rows(model, [[6] * 20], OPTIONS["max_new_tokens"])[0]
    monkeypatch.setattr(sampler, "CPU_BYTES", 2 * of_row)
    assert sample(model, SHARED, keys) == whole
    assert len(calls) > 1 and all(len(rows) > 1 for rows in calls[1:-1])


def test_continuous_batching_on_a_cpu_has_cache_for_a_call_that_fits(monkeypatch):
    """On an accelerator it sizes its cache by what is free; on a CPU it allocates one for all rows of a call."""
    model, rows, plain = tiny.llama(), [], sampler.BACKENDS["continuous"]
    whole = sample(model, SHARED, list("abcdefg"), backend="continuous", do_sample=False)
    monkeypatch.setitem(sampler.BACKENDS, "continuous", lambda *a: (rows.append(len(a[1])), plain(*a))[1])
    assert sample(model, SHARED, list("abcdefg"), 60, "continuous", do_sample=False) == whole
    assert len(rows) > 1 and sum(rows) == len(SHARED)


def test_the_estimate_of_a_rows_memory_covers_its_cache(monkeypatch):
    model, held, fan_out = tiny.llama(), [], prefix_cache.fan_out

    def measured(cache, rows, room):
        fan_out(cache, rows, room)
        held.append(sum(layer.room_keys.nbytes + layer.room_values.nbytes for layer in cache.layers))

    monkeypatch.setattr(prefix_cache, "fan_out", measured)
    sample(model, SHARED, list("abcdefg"))
    widest = max(SHARED, key=len)
    assert (
        held[0] < sum(sampler._bytes_of_rows(model, [widest] * len(SHARED), OPTIONS["max_new_tokens"])) < 60 * held[0]
    )


def test_attention_that_is_not_fused_takes_more_of_a_long_prompt():
    model, prompts = tiny.llama(), [[1] * 100, [1] * 200]
    fused = sampler._bytes_of_rows(model, prompts, 8)
    model.set_attn_implementation("eager")
    eager = sampler._bytes_of_rows(model, prompts, 8)
    assert [more - less for more, less in zip(eager, fused, strict=True)] == [4 * 8 * 100**2, 4 * 8 * 200**2]


def test_no_prompts_are_no_completions():
    assert sample(tiny.llama(), [], []) == []


class Sick:
    """Logits of the given rows of the first forward are not numbers."""

    def __init__(self, model, rows, value=float("nan")):
        def hook(module, inputs, logits):
            if rows and len(logits) > max(rows):
                logits = logits.clone()
                logits[rows] = value
            return logits

        self.hook = model.lm_head.register_forward_hook(hook)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 5}, {"do_sample": False},
                                     {"cache_implementation": "static"}])  # fmt: skip
def test_logits_that_are_not_numbers_end_with_generation_batch_and_rows(value, options):
    model = tiny.llama().train()
    prompts, keys = [[1, 2], [3, 4], [5, 6]], ["train/7/0", "train/7/1", "train/7/2"]
    before = sample(model, prompts, keys, **options)
    with Sick(model, [1], value), pytest.raises(NonFiniteLogits, match=r"rollout of train/7, rows 1; .* earlier"):
        sample(model, prompts, keys, **options)
    with Sick(model, [0], value), pytest.raises(NonFiniteLogits, match="train/7, rows 0, 1, 2;"):  # calls of one row
        sample(model, prompts, keys, batch_tokens=1, **options)
    assert model.training and sample(model, prompts, keys, **options) == before


@pytest.mark.parametrize("options", [{}, {"do_sample": False}])
def test_logits_that_are_not_numbers_end_continuous_batching_as_well(options):
    model = tiny.llama()
    with Sick(model, [0]), pytest.raises(NonFiniteLogits, match="train/7, rows 0, 1;"):
        sample(model, [[1, 2], [3, 4]], ["train/7/0", "train/7/1"], backend="continuous", **options)
    assert len(sample(model, [[1, 2]], ["a"], backend="continuous")) == 1


def test_a_draw_among_not_numbers_is_a_token_of_the_vocabulary():
    scores = torch.full((2, 6), float("nan"))
    scores[1, 3] = scores[1, 4] = 0.0
    draws = Draws(["a", "b"], 1, scores.device)
    assert draws.choose(scores, torch.tensor([0, 1]), 0).max() < 6
    assert draws.non_finite_R.tolist() == [True, True]


def windowed():
    """A model whose layers see a window."""
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralForCausalLM.config_class(
            vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, sliding_window=6,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [tiny.llama, windowed])
@pytest.mark.parametrize("prompts", [SHARED, [[1, 2, 3], [4, 5, 6]] * 3], ids=["padded", "of one length"])
@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_p": 0.7, "repetition_penalty": 1.2}])
def test_completions_do_not_depend_on_how_often_finished_rows_are_looked_for(monkeypatch, make, prompts, options):
    model, keys = make(), list("abcdefg")[: len(prompts)]
    expected = sample(model, prompts, keys, max_new_tokens=50, **options)
    if not options and make is tiny.llama:
        assert len({len(completion.ids) for completion in expected}) > 2
    for every in (8, 1000):
        monkeypatch.setattr(decoding, "LOOK_EVERY_CPU", every)
        for got, one in zip(sample(model, prompts, keys, max_new_tokens=50, **options), expected, strict=True):
            assert (got.ids, got.truncated) == (one.ids, one.truncated)
            assert got.log_probs == pytest.approx(one.log_probs, abs=1e-4)


def test_logits_that_are_not_numbers_after_a_rows_end_are_nothing(monkeypatch):
    """Between two looks a finished row is computed on, and nobody asked for it."""
    model, keys = tiny.llama(), list("abcdefg")
    expected = sample(model, SHARED, keys, max_new_tokens=50)
    lengths = [len(completion.ids) for completion in expected]
    first = lengths.index(min(lengths))
    monkeypatch.setattr(decoding, "LOOK_EVERY_CPU", 1000)
    calls = []

    def hook(module, inputs, logits):
        calls.append(len(logits))
        if len(calls) > min(lengths):
            logits = logits.clone()
            logits[first] = float("nan")
        return logits

    with model.lm_head.register_forward_hook(hook):
        got = sample(model, SHARED, keys, max_new_tokens=50)
    assert (
        calls[1:] == [len(SHARED)] * 49
        and min(lengths) < 49
        and [each.ids for each in got] == [each.ids for each in expected]
    )


@pytest.mark.parametrize(
    "make, prompts, options",
    [
        (tiny.llama, SHARED, {}),
        (windowed, SHARED, {"do_sample": False}),
        (tiny.llama, [[1, 2, 3]] * 6, {"top_p": 0.7, "top_k": 20, "temperature": 0.7}),
    ],
)
def test_the_host_waits_for_the_device_only_to_look_for_finished_rows(monkeypatch, make, prompts, options):
    """As on a GPU. A look reads which rows are finished, and sends which go on; a call reads and sends a few more."""
    monkeypatch.setattr(decoding, "LOOK_EVERY_CPU", 8)
    model, keys = make(), list("abcdefg")[: len(prompts)]
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.index_fill(-1, end, float("-inf")))
    found, end = [], torch.tensor([EOS])
    for longest in (16, 32):
        with HostSyncs() as syncs:
            made = sample(model, prompts, keys, max_new_tokens=longest, **options)
        found.append(syncs.count)
    assert min(len(completion.ids) for completion in made) == 32
    assert found[1] - found[0] <= 2 * (16 / 8)
    assert found[0] <= 2 * (16 / 8) + 30


def test_transformers_look_at_a_mask_comes_back():
    fast_all = masking_utils.fast_all
    with pytest.raises(KeyError), prefix_cache.padding_known():
        assert not masking_utils.fast_all(torch.ones(1))
        raise KeyError
    assert masking_utils.fast_all is fast_all


def test_few_rows_are_decoded_with_transformers_settings_for_mixtures_of_experts(monkeypatch):
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model, entered = MixtralForCausalLM(config), []
    settings = model._optimize_model_for_decode
    monkeypatch.setattr(model, "_optimize_model_for_decode", lambda: entered.append(1) or settings())
    for rows, expected in ((2, [1]), (3, [])):  # copies of 2 experts per row, of 4
        entered.clear()
        sample(model, [[1, 2, 3]] * rows, list("abc")[:rows])
        assert entered == expected


def test_repetitions_are_penalized_as_by_transformers_also_when_rows_leave():
    """Rows of padded prompts, each with its own padding, that end at different times."""
    model, keys, penalty = tiny.llama(), list("abcdefg"), {"repetition_penalty": 1.3, "max_new_tokens": 40}
    together = sample(model, SHARED, keys, **penalty)
    assert len({len(completion.ids) for completion in together}) > 1
    assert together == [sample(model, [prompt], [key], **penalty)[0] for prompt, key in zip(SHARED, keys, strict=True)]
    assert together == sample(model, SHARED, keys, cache_implementation="static", **penalty)
