"""What is sent in a step, counted on the calls themselves, against what sdft_ds.traffic says."""

import pytest

from sdft_ds.plan.job import SETUPS, Job
from sdft_ds.plan.model_shape import shape_of
from sdft_ds.plan.traffic import volumes
from tests.distributed.scenarios.communication import received
from tests.helpers import tiny


@pytest.mark.parametrize(
    "stage, kind, accumulation, tied",
    [(1, "live", 2, True), (2, "live", 2, True), (2, "ema", 1, False), (3, "live", 1, True), (3, "ema", 2, False)],
)
def test_volumes_are_those_that_are_counted(two_ranks, stage, kind, accumulation, tied):
    counted = two_ranks.run(
        received, stage, teacher_model_kind=kind, gradient_accumulation_steps=accumulation, max_steps=2, grown=True,
        tied=tied,
    )[0]  # fmt: skip
    job = Job(
        shape=shape_of(tiny.llama(tie_word_embeddings=tied)), ranks=2, teacher=kind, bf16=False, batch=2,
        accumulation=accumulation, generations=2, prompt=64, teacher_prompt=128, completion=8,
    )  # fmt: skip
    predicted = volumes(job, SETUPS[stage])
    gradients = predicted.pop("gradients")
    assert counted["gradients"] == pytest.approx(gradients, rel=0.02)
    assert counted["weights"] == pytest.approx(sum(predicted.values()), rel=0.02)
