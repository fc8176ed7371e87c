import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from sdft_ds.data.batch import LossMask
from sdft_ds.model import prefix_cache
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.teacher.scoring import Scorer
from tests.helpers import reference, tiny
from tests.helpers.trainers import make_trainer


def scorer_of(trainer, skip=0, **settings):
    parts = trainer.objective.parts
    options = {"dtype": torch.float32, "keep_on": torch.device("cpu"), "temperature": 1.0, "tokens_per_batch": 16384}
    return Scorer(
        engine=trainer.model_wrapped, teacher=trainer.teacher, loss_mask=LossMask(skip),
        pad_token_id=parts.tokenizer.pad_token_id, packing=parts.packing, **{**options, **settings},
    )  # fmt: skip


def rollouts_of(trainer, n=8):
    item = next(iter(trainer.get_train_dataloader()))
    return trainer.objective.begin_rollout(trainer.train_dataset, item.slots[:n], "a", trainer.meters["train"]).wait()


@pytest.fixture(scope="module")
def trainer():
    made = make_trainer(num_generations=4, per_device_train_batch_size=8, max_completion_length=12)
    with made.prepared():
        yield made


def expected_states(trainer, rollout, skip):
    model = causal_lm_of(trainer.model).eval()
    prompt, ids = rollout.prompts.teacher.ids, rollout.completion.ids
    states = model.model(torch.tensor([prompt + ids])).last_hidden_state[0]
    return states[len(prompt) - 1 + min(skip, len(ids)) : -1].detach()


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("budget", [1, 200, 16384])
@pytest.mark.parametrize("shared", [True, False])
def test_states_are_those_of_each_row_by_itself(trainer, monkeypatch, skip, budget, shared):
    """With the prompt computed once for its completions and not, and however rows are batched."""
    monkeypatch.setattr(trainer.args, "num_generations", 4 if shared else 1)
    rollouts = rollouts_of(trainer)
    states = scorer_of(trainer, skip, tokens_per_batch=budget).score(rollouts, head_changes=False)
    assert states.head is None
    for rollout, hidden_ND in zip(rollouts, states.hidden, strict=True):
        if not rollout.empty:
            torch.testing.assert_close(hidden_ND, expected_states(trainer, rollout, skip), rtol=1e-4, atol=1e-5)


def test_a_shared_prompt_is_computed_once(trainer, monkeypatch):
    rollouts, computed = rollouts_of(trainer), []
    inner = trainer.model.model.forward

    def counting(*args, **kwargs):
        computed.append(kwargs["input_ids"].numel())
        return inner(*args, **kwargs)

    monkeypatch.setattr(trainer.model.model, "forward", counting)
    scorer_of(trainer).score(rollouts, head_changes=False)
    prompts = [len(rollout.prompts.teacher.ids) for rollout in rollouts]
    assert len(computed) == 2 and computed[0] == 2 * max(prompts)  # two prompts with four completions each
    assert computed[1] == 8 * (max(len(rollout.completion.ids) for rollout in rollouts) - 1)


def test_recurrent_models_compute_whole_rows(trainer, monkeypatch):
    rollouts, lengths = rollouts_of(trainer), []
    monkeypatch.setattr(prefix_cache, "supports_prefixes", lambda model: False)
    inner = trainer.model.model.forward
    monkeypatch.setattr(
        trainer.model.model, "forward", lambda *a, **k: (lengths.append(k["input_ids"].numel()), inner(*a, **k))[1]
    )
    scorer_of(trainer).score(rollouts, head_changes=False)
    assert sum(lengths) >= sum(len(r.prompts.teacher.ids) + len(r.completion.ids) for r in rollouts)


def test_old_log_probabilities_are_those_of_each_row_by_itself(trainer):
    rollouts = rollouts_of(trainer)
    for rollout, got in zip(rollouts, scorer_of(trainer).student_log_probs(rollouts), strict=True):
        ids = rollout.completion.ids
        logits = reference.logits_of_completion(trainer.model.eval(), rollout.prompts.student.ids, ids, 1.0)
        expected = logits.log_softmax(-1)[range(len(ids)), ids].detach()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_head_in_four_bits(tmp_path):
    """The loss of a model whose head is quantised is that of its own logits."""
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=[]
    )
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32)
    if type(model.lm_head).__name__ != "Linear4bit":
        pytest.fail("transformers did not quantise the head")
    trainer = make_trainer(model=model, lora=True, max_steps=2)
    trainer.train()
    inputs = trainer.step_inputs or trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")[0]
    loss = trainer.compute_loss(trainer.model.eval(), inputs[0]).item()
    rollouts = inputs[0]["scored"].batch.rollouts
    teacher = reference.WithoutAdapter(trainer.model)
    expected = reference.step_loss(trainer.model, teacher, [rollouts], alpha=0.5, topk=100)
    assert loss == pytest.approx(expected.item(), rel=1e-3)
