"""Every teacher kind, at every ZeRO stage on two ranks, against a plain loop with a literal second model."""

import pytest
import torch

from tests.helpers import reference
from tests.helpers.cases import covering
from tests.helpers.trainers import PROBE, grown_student, train

KINDS = ["live", "base", "ema"]
RUN = {"max_steps": 4, "distillation_alpha": 0.0, "distillation_mode": "full_logits", "teacher_update_rate": 0.3,
       "teacher_sync_steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def literal():
    """(losses, gradient norms, teacher's weights by name, teacher's logits, our plain run) for (kind, lora, tied)."""
    made = {}

    def get(kind, lora, tied=True):
        key = (kind, lora, tied)
        if key not in made:
            ours = train(
                grown=True, lora=lora, tied=tied, teacher_model_kind=kind, per_device_train_batch_size=4, **RUN
            )
            losses, norms, teacher = reference.train(
                grown_student(lora, tied), ours["rollouts"], kind, lora, rate=0.3, sync_steps=2, alpha=0.0
            )
            weights = dict(teacher.named_parameters())
            made[key] = losses, norms, weights, teacher(PROBE).logits.detach(), ours
        return made[key]

    return get


def assert_equal(got, expected, kind):
    losses, norms, weights, logits, _ = expected
    torch.testing.assert_close(got["losses"], losses, rtol=5e-6, atol=1e-7)
    if got["grad_norms"][0] is not None:
        torch.testing.assert_close(got["grad_norms"], norms, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(got["teacher_logits"], logits, rtol=1e-5, atol=5e-6 if kind == "base" else 2e-5)
    for name, offset, values in got["shadow"]:
        whole = weights[name].detach().flatten()[offset : offset + len(values)]
        torch.testing.assert_close(values[: len(whole)], whole, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_one_process_equals_a_literal_second_model(literal, kind, lora):
    expected = literal(kind, lora)
    assert_equal(expected[-1], expected, kind)
    if kind == "base":
        assert expected[0][0] != pytest.approx(expected[0][-1])  # it is not the student that teaches


@pytest.mark.parametrize("stage, kind, lora", covering([None, 2, 3], KINDS, [False, True], others=[0, 1]))
def test_two_ranks_equal_a_literal_second_model(two_ranks, literal, stage, kind, lora):
    expected = literal(kind, lora)
    results = two_ranks.run(train, stage, grown=True, lora=lora, teacher_model_kind=kind, **RUN)
    for got in results:
        assert_equal(got, expected, kind)
    if kind == "ema" and stage is not None and stage > 0:
        held = sum(len(values) for got in results for _, _, values in got["shadow"])
        trained = sum(p.numel() for n, p in grown_student(lora).named_parameters() if p.requires_grad)
        assert trained <= held <= 1.1 * trained + 64  # a shard on each rank, padding aside


@pytest.mark.parametrize("stage, kind", covering([1, 2, 3], KINDS))
def test_a_head_of_its_own(two_ranks, literal, stage, kind):
    """Embeddings that are not tied: the teacher's head is another matrix than its embedding, and is trained."""
    for got in two_ranks.run(train, stage, grown=True, tied=False, teacher_model_kind=kind, **RUN):
        assert_equal(got, literal(kind, False, tied=False), kind)


@pytest.mark.parametrize("stage, kind, lora", covering([None, 2, 3], KINDS, ["on the head", "head saved"]))
def test_an_adapted_head(two_ranks, literal, stage, kind, lora):
    """LoRA on the head, and a head that is trained in full beside the adapter, as the teacher's kind sees them."""
    for got in two_ranks.run(train, stage, grown=True, lora=lora, tied=False, teacher_model_kind=kind, **RUN):
        assert_equal(got, literal(kind, lora, tied=False), kind)
