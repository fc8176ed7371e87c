import warnings

import pytest
from transformers import TrainerControl, TrainerState

from sdft_ds.metrics.mismatch import DIFFERENCE, MismatchGuard


def told(values):
    """The step of the first warning, or None."""
    guard = MismatchGuard()
    guard.on_train_begin(None, None, None)
    for step, value in enumerate(values, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            guard.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={DIFFERENCE: value})
        if caught:
            assert f"At step {step} " in str(caught[0].message)
            return step
    return None


@pytest.mark.parametrize(
    "values, step",
    [
        ([0.06, 0.07, 0.05], None),
        ([0.015, 0.016, 0.2], 3),  # an engine that kept older weights
        ([1e-7, 2e-6, 1e-5], None),
        ([7.0, 7.0], 1),  # an engine without the weights
        ([0.01, float("nan")], 2),
    ],
)
def test_warns_at_the_first_step_far_above_the_floor(values, step):
    assert told(values) == step
