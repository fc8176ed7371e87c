from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from sdft_ds.plan.footprint import footprint
from sdft_ds.plan.job import OFFLOAD, OFFLOAD_OPTIMIZER, PLAIN, SETUPS, ZERO_0, ZERO_2, ZERO_3, Job
from sdft_ds.plan.model_shape import load_shape, shape_of
from tests.distributed.scenarios import communication
from tests.helpers import tiny
from tests.helpers.cases import covering
from tests.helpers.trainers import ADAPTERS, make_trainer

SEVEN = Job(load_shape("7b"), ranks=8, teacher="ema")
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("stage, bf16", covering([0, 3], [False, True], others=[1, 2]))
def test_what_stays_is_what_real_engines_hold(two_ranks, stage, bf16):
    held = two_ranks.run(communication.held, stage, bf16=bf16, teacher_model_kind="ema", max_steps=1)[0]
    job = Job(shape_of(tiny.llama()), ranks=2, teacher="ema", bf16=bf16)
    parts = footprint(job, SETUPS[stage]).parts
    for part, size in held.items():
        assert parts[part] == pytest.approx(size, rel=0.03), part


@pytest.mark.parametrize("stage", [2, 3])
def test_of_a_lora_job_only_the_adapter_is_trained_and_shadowed(two_ranks, stage):
    held = two_ranks.run(communication.held, stage, lora=True, teacher_model_kind="ema", max_steps=1)[0]
    shape = shape_of(tiny.llama())
    job = Job(shape, ranks=2, tuning="lora", adapter=shape.adapter_parameters(4, None), teacher="ema", bf16=False)
    parts = footprint(job, SETUPS[stage]).parts
    for part, size in held.items():
        assert parts[part] == pytest.approx(size, rel=0.03), part


def test_without_deepspeed_what_lora_leaves_frozen_takes_what_it_does_in_an_engine(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = make_trainer(model=str(tmp_path), peft_config=ADAPTERS[True], bf16=True).model
    frozen = sum(param.nbytes for param in model.parameters() if not param.requires_grad)
    shape = shape_of(tiny.llama())
    job = Job(shape, ranks=1, tuning="lora", adapter=shape.adapter_parameters(4, None))
    assert footprint(job, ZERO_0).parts["weights"] == frozen + 2 * job.adapter


def activations(job: Job, phase: str) -> float:
    return footprint(job, ZERO_2).phases[phase]["activations"]


def peak(run) -> int:
    """The most bytes that tensors took while it ran, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    most = taken = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        taken += size
        most = max(most, taken)
    return most


@pytest.mark.parametrize("overrides", [WIDE, {**WIDE, "hidden_size": 128, "num_key_value_heads": 4}])
@pytest.mark.parametrize("bf16, checkpointing", [(False, False), (False, True), (True, False), (True, True)])
def test_activations_are_as_measured(overrides, bf16, checkpointing):
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = tiny.llama(dtype=dtype, num_hidden_layers=4, attention_dropout=0.0, **overrides)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 200, (8, 256))
    job = Job(
        shape_of(model), ranks=1, bf16=bf16, checkpointing=checkpointing, batch=8, prompt=192, completion=64,
        generations=1, teacher_prompt=192,
    )  # fmt: skip

    def student():
        model.model(input_ids=tokens, use_cache=False).last_hidden_state.mean().backward()

    student()  # the weights' gradients of the weights are made once
    assert activations(job, "backward") == pytest.approx(peak(student), rel=0.1)
    with torch.no_grad():
        forward = peak(lambda: model.model(input_ids=tokens, use_cache=False))
    assert activations(job, "teacher") == pytest.approx(forward, rel=0.1)


def test_adapters_in_fp32_keep_their_inputs_again():
    model = tiny.llama(dtype=torch.bfloat16, num_hidden_layers=4, attention_dropout=0.0, **WIDE)
    shape = shape_of(model)
    config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules="all-linear")
    model = get_peft_model(model, config).base_model.model
    tokens = torch.randint(0, 200, (8, 256))

    def student():
        model.model(input_ids=tokens, use_cache=False).last_hidden_state.mean().backward()

    student()
    job = Job(
        shape, ranks=1, tuning="lora", adapter=shape.adapter_parameters(1, None), checkpointing=False, prompt=192,
        completion=64,
    )  # fmt: skip
    assert footprint(job, ZERO_3).phases["backward"]["activations"] == pytest.approx(peak(student), rel=0.1)


def test_later_stages_and_more_offload_take_less():
    peaks = [footprint(SEVEN, setup).peak for setup in SETUPS]
    assert peaks == sorted(peaks, reverse=True)
    hosts = [footprint(SEVEN, setup).host for setup in (ZERO_3, OFFLOAD_OPTIMIZER, OFFLOAD)]
    assert hosts == sorted(hosts) and hosts[0] == 0


def test_more_ranks_take_less_of_what_is_sharded():
    few, many = SEVEN, replace(SEVEN, ranks=64)
    for setup in SETUPS[1:]:
        assert footprint(many, setup).parts["optimizer"] <= footprint(few, setup).parts["optimizer"]
        assert (
            footprint(many, setup).peak + footprint(many, setup).host
            < footprint(few, setup).peak + footprint(few, setup).host
        )


@pytest.mark.parametrize(
    "change, part",
    [
        ({"teacher": "live"}, "teacher shadow"),
        ({"shadow_on_host": True}, "teacher shadow"),
        ({"tuning": "lora", "adapter": 10**7}, "optimizer"),
        ({"checkpointing": True}, "activations"),
        ({"completion": 16}, "KV cache"),
        ({"topk": 100}, "logits chunk"),
    ],
)
def test_a_setting_lowers_its_part(change, part):
    dear = replace(SEVEN, checkpointing=False, topk=None)
    assert footprint(replace(dear, **change), ZERO_2).parts[part] < footprint(dear, ZERO_2).parts[part]


def test_a_rollout_holds_as_many_rows_as_it_generates_at_once():
    all_rows, two = (
        footprint(replace(SEVEN, rollout_tokens=tokens), ZERO_2).phases["rollout"] for tokens in (None, 2000)
    )
    assert SEVEN.rows == 8 and all_rows["KV cache"] == 4 * two["KV cache"]
    assert all_rows["logits chunk"] == 4 * two["logits chunk"]


def test_of_an_offloaded_optimizer_one_parameters_masters_come_to_the_device():
    """And none where the weights are in host memory as well."""
    largest = 4 * SEVEN.shape.largest / 8
    shadow, whole = (footprint(replace(SEVEN, shadow_on_host=host), OFFLOAD_OPTIMIZER) for host in (True, False))
    for phase, more in (("rollout", 0), ("teacher", largest), ("optimizer", largest)):
        assert whole.phases[phase]["teacher shadow"] == 4 * SEVEN.trained / 8 + more
    assert (
        shadow.parts["teacher shadow"]
        == largest
        == footprint(replace(SEVEN, shadow_on_host=True), ZERO_2).parts["teacher shadow"]
    )
    assert footprint(SEVEN, OFFLOAD).parts["teacher shadow"] == 0


def test_a_window_bounds_what_a_rollout_caches():
    cache = replace(SEVEN.shape.cache, windows=(128, None) * 16)
    windowed = replace(SEVEN, shape=replace(SEVEN.shape, cache=cache))
    whole, half = (footprint(job, ZERO_2).phases["rollout"]["KV cache"] for job in (SEVEN, windowed))
    assert half == whole * (768 + 128) / (2 * 768)


def test_a_rollout_of_zero_3_holds_all_weights_unless_it_gathers_layer_by_layer():
    job = replace(SEVEN, ranks=64)
    whole, layers = (footprint(job, replace(ZERO_3, gather=gather)) for gather in (True, False))
    assert whole.phases["rollout"]["gathered weights"] == 2 * job.shape.parameters
    assert layers.phases["rollout"]["gathered weights"] < 2.5e9 and whole.peak_phase == "rollout"


def test_four_bits_are_an_eighth_of_fp32_and_their_scales():
    job = replace(SEVEN, tuning="qlora", adapter=10**7)
    assert job.weights + job.scales == pytest.approx(
        0.5625 * job.shape.linear_parameters + 2 * (262144000 + 10**7), rel=0.01
    )


def test_without_deepspeed_what_is_trained_is_in_fp32_and_has_no_masters(tmp_path):
    trainer = make_trainer(bf16=True, teacher_model_kind="ema", max_steps=1)
    trainer.train()
    parameters = sum(param.numel() for param in trainer.model.parameters())
    states = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    moments = sum(state[name].nbytes for state in states.values() for name in ("exp_avg", "exp_avg_sq"))
    job = Job(shape_of(trainer.model), ranks=1, teacher="ema", accumulation=1)
    found = footprint(job, PLAIN)
    assert found.phases["optimizer"]["weights"] == 4 * parameters == sum(p.nbytes for p in trainer.model.parameters())
    assert found.parts["optimizer"] == moments == 8 * parameters
    assert found.phases["optimizer"]["gradients"] == found.parts["teacher shadow"] == 4 * parameters
