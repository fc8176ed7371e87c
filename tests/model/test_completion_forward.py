import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    PhiConfig,
    Qwen3Config,
)

from sdft_ds.loss.chunked import LossTerms
from sdft_ds.loss.divergence import Divergence
from sdft_ds.model.completion_forward import (
    DistillationLoss,
    HiddenStates,
    Logits,
    RequestForward,
    TokenLogProbs,
    check,
    head_of,
)
from tests.helpers import tiny

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
ARCHITECTURES = {
    "gemma2 (softcap)": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "granite (divides)": GraniteConfig(**SMALL, logits_scaling=3.0),
    "cohere (multiplies)": CohereConfig(**SMALL, logit_scale=0.25),
    "phi (head with bias)": PhiConfig(**SMALL),
    "qwen3 (tied)": Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
}
CPU = torch.device("cpu")


def inputs(rows=2, width=6):
    ids = torch.arange(rows * width).view(rows, width) * 7 % 90 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_logits_are_the_models_own_whatever_it_does_after_its_head(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    own = model(**inputs()).logits.detach()
    RequestForward(model).__enter__()
    positions = torch.tensor([1, 4, 9])
    ours = model(**inputs(), request=Logits(positions))
    torch.testing.assert_close(ours, own.flatten(0, 1)[positions])
    torch.testing.assert_close(model(**inputs()).logits, own)
    check(model, model, CPU)


def test_requests_answer_at_their_positions():
    model = tiny.llama().eval()
    RequestForward(model).__enter__()
    positions, tokens = torch.tensor([2, 7]), torch.tensor([5, 9])
    output = model(**inputs(), output_hidden_states=True)
    torch.testing.assert_close(
        model(**inputs(), request=HiddenStates(positions)), output.hidden_states[-1].flatten(0, 1)[positions]
    )
    expected = (output.logits.flatten(0, 1)[positions] / 0.5).log_softmax(-1)[[0, 1], tokens]
    got = model(**inputs(), request=TokenLogProbs(positions, tokens, 0.5))
    torch.testing.assert_close(got, expected.detach())


def test_the_loss_leaves_its_terms_on_the_request():
    model = tiny.llama().eval()
    RequestForward(model).__enter__()
    terms = LossTerms(Divergence("full_logits"), torch.zeros(2, 32), None, torch.tensor([5, 9]), torch.ones(2))
    request = DistillationLoss(torch.tensor([2, 7]), terms, torch.tensor(0.5))
    loss = model(**inputs(), request=request)
    assert loss.item() == pytest.approx(0.5 * request.per_token_N.sum().item())


def test_a_deep_copy_has_its_own_forward():
    model = tiny.llama().eval()
    RequestForward(model).__enter__()
    copied = copy.deepcopy(model)
    before = copied(**inputs()).logits
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    torch.testing.assert_close(copied(**inputs()).logits, before)
    assert copied(**inputs(), request=Logits(torch.tensor([0]))).abs().sum() > 0


def test_generation_still_knows_the_models_inputs():
    model = tiny.llama().eval()
    expected = model.generate(inputs()["input_ids"], do_sample=False, max_new_tokens=4, pad_token_id=0)
    RequestForward(model).__enter__()
    got = model.generate(inputs()["input_ids"], do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="model_kwargs"):
        model.generate(inputs()["input_ids"], not_an_input=1)


def test_a_head_that_is_not_linear_is_refused():
    model = tiny.llama()
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 264)))
    with pytest.raises(ValueError, match="head is a Sequential"):
        head_of(model)
