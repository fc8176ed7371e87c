import pytest
import torch

from sdft_ds.evaluation import retention
from sdft_ds.loss import chunked
from sdft_ds.model.completion_forward import RequestForward
from tests.helpers import tiny

PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]
TOKENS = [[7, 8, 9, 10], [11], [12, 13, 14]]
CPU = torch.device("cpu")


def model(seed, **overrides):
    made = tiny.llama(seed, **overrides).eval()
    RequestForward(made).__enter__()
    return made


@torch.no_grad()
def literal(start, now, buckets):
    """KL(start || now) of each row with both models and whole logits; buckets: likeliest tokens, or None for all."""
    sums = []
    for prompt, tokens in zip(PROMPTS, TOKENS, strict=True):
        ids = torch.tensor([prompt + tokens])
        p, q = (each(ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for each in (start, now))
        if buckets is not None:
            kept = p.topk(buckets, dim=-1).indices
            p, q = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (p, q))
        sums.append((p * (p / q).log()).sum().item())
    return sums


@pytest.mark.parametrize("chunk_elements", [1, 1000, 1 << 23])
@pytest.mark.parametrize("vocabulary, buckets", [(264, retention.LIKELIEST), (100, None)])
def test_the_divergence_is_that_of_two_literal_models(monkeypatch, chunk_elements, vocabulary, buckets):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk_elements)
    first, second = model(0, vocab_size=vocabulary), model(1, vocab_size=vocabulary)
    start = retention.continuations(first, PROMPTS, TOKENS, 0, CPU)
    assert [row.tokens for row in start] == TOKENS
    assert retention.divergences(first, PROMPTS, start, 0, CPU) == [0.0, 0.0, 0.0]
    found = retention.divergences(second, PROMPTS, start, 0, CPU)
    assert found == pytest.approx(literal(first, second, buckets), rel=1e-4)
    assert retention.mean(found, start) == pytest.approx(sum(found) / 8)
    assert all(lower <= whole * (1 + 1e-4) for lower, whole in zip(found, literal(first, second, None), strict=True))


def test_what_is_saved_is_read_back_for_the_same_prompts_only(tmp_path):
    start = retention.continuations(model(0), PROMPTS, TOKENS, 0, CPU)
    with pytest.raises(FileNotFoundError, match="retention_file: .* does not exist"):
        retention.load(tmp_path, PROMPTS)
    retention.save(tmp_path, PROMPTS, start)
    for row, saved in zip(start, retention.load(tmp_path, PROMPTS), strict=True):
        assert saved.tokens == row.tokens and torch.equal(saved.indices_MK, row.indices_MK)
        assert torch.equal(saved.log_probs_MB, row.log_probs_MB)
    with pytest.raises(ValueError, match="was made for other prompts"):
        retention.load(tmp_path, [*PROMPTS[:2], [5, 7]])
