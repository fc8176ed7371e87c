"""Every file in ds_configs/ trains on two ranks, with an EMA teacher, to the losses of a run without DeepSpeed."""

import json

import pytest
import torch

from tests.distributed.scenarios import configurations
from tests.helpers.trainers import DS_CONFIGS, train

FILES = sorted(path.name for path in DS_CONFIGS.glob("*.json"))
RUN = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3, "max_steps": 4}
FAST = {"zero1.json", "zeropp.json"}  # the others of the fast set are in test_teachers.py


@pytest.fixture(scope="module")
def without_deepspeed():
    run = train(per_device_train_batch_size=4, **RUN)
    return run["losses"], run["teacher_logits"]


@pytest.mark.timeout(1500)  # DeepSpeed's operators are built here the first time, which takes minutes
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.full) for n in FILES])
def test_a_configuration_trains(two_ranks, without_deepspeed, name):
    config = json.loads((DS_CONFIGS / name).read_text())
    zero = config["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2  # the ranks of this machine
    for result in two_ranks.run(train, None, deepspeed=config, timeout=1200, **RUN):
        torch.testing.assert_close(result["losses"], without_deepspeed[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result["teacher_logits"], without_deepspeed[1], rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("what", ["offload_param", "offload_optimizer"])
def test_nvme_is_refused(one_rank, what):
    config = json.loads((DS_CONFIGS / "zero3_offload.json").read_text())
    config["zero_optimization"][what] = {"device": "nvme", "nvme_path": "/tmp"}
    [message] = one_rank.run(configurations.refusal, deepspeed=config)
    assert f'{what}.device="nvme" is not supported' in message and 'Write "cpu"' in message
