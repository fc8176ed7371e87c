"""Weights for an inference engine: all of them, once, whole, merged, under every ZeRO stage."""

import pytest
import torch

from tests.distributed.scenarios import export

REPEATED = [(None, False), (3, False), (3, "on the head")]
CASES = [(2, True), (3, True), (3, "head saved"), (None, "on the head"),
         *(pytest.param(*case, marks=pytest.mark.full) for case in REPEATED)]  # fmt: skip


@pytest.mark.parametrize("stage, lora", CASES, ids=str)
def test_all_weights_are_exported_once_as_they_are_merged(two_ranks, stage, lora):
    got = two_ranks.run(export.export_after_steps, stage, lora)
    for rank in got:
        names = [name for name, _ in rank["exported"]]
        assert len(names) == len(set(names))
        assert rank["tied"] == (lora not in ("on the head", "head saved"))
        assert set(names) == set(rank["merged"]) - ({"lm_head.weight"} if rank["tied"] else set())
        for name, tensor in rank["exported"]:
            torch.testing.assert_close(tensor, rank["merged"][name], rtol=0, atol=1e-6, msg=name)
    if stage == 3:
        assert got[0]["shards"] < sum(tensor.numel() for _, tensor in got[0]["exported"])
    assert got[0]["largest"] < 0.6
