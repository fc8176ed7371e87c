"""Which combinations of settings the fast tests try."""

import itertools

import pytest


def covering(*dimensions, others=()):
    """All combinations; those beyond a few that have each value of each dimension are left to --full.

    others: values of the first dimension of which all combinations are.
    """
    count = max(map(len, dimensions))
    fast = {tuple((i + d) % len(values) for d, values in enumerate(dimensions)) for i in range(count)}
    dimensions = ([*dimensions[0], *others], *dimensions[1:])
    return [
        pytest.param(
            *(values[i] for values, i in zip(dimensions, at, strict=True)),
            marks=[] if at in fast else pytest.mark.full,
        )
        for at in itertools.product(*(range(len(values)) for values in dimensions))
    ]
