import copy
import dataclasses
import re
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback, TrainerState

from sdft_ds import SDFTConfig, SDFTTrainer
from sdft_ds.metrics.nonfinite import NonFiniteGuard
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.objectives.sdft import SelfDistillation
from tests.helpers import reference, tiny
from tests.helpers.host_syncs import HostSyncs
from tests.helpers.steps import check_against_the_reference, first_step, loss_and_gradients
from tests.helpers.trainers import Recorder, make_trainer, train

LOSSES = [
    {"distillation_alpha": 0.0, "distillation_mode": "full_logits"},
    {"distillation_alpha": 0.5, "distillation_topk": 20},
    {"distillation_alpha": 1.0, "distillation_topk": 20, "distillation_add_tail": True},
    {"distillation_alpha": 0.0, "distillation_topk": 20, "distillation_support": "union"},
    {"distillation_topk": 20, "distillation_support": "teacher", "distillation_add_tail": True},
    {"loss_type": "grpo", "num_loss_tokens_to_skip": 3, "temperature": 0.8},
    {"distillation_alpha": 0.0, "distillation_mode": "full_logits", "teacher_temperature": 0.5, "temperature": 0.8},
    {"loss_type": "bnpo", "num_loss_tokens_to_skip": 1},
    {"loss_type": "dr_grpo", "mask_truncated_completions": True, "max_completion_length": 24},
]


@pytest.mark.parametrize("settings", LOSSES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_equals_the_naive_reference_in_loss_and_gradients(settings, lora, tied):
    model = tiny.llama(tie_word_embeddings=tied)
    trainer = make_trainer(model=model, lora=lora, gradient_accumulation_steps=2, **settings)
    if lora:  # at its start an adapter changes nothing, and the teacher would be the student
        for name, param in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.3)
    check_against_the_reference(trainer, within=2e-6)


class Payloads(TrainerCallback):
    def __init__(self):
        self.events = []

    def record(self, name, *, args, state, control, **payload):
        assert payload.pop("model") is not None and payload.pop("processing_class") is not None
        self.events.append((name, payload))

    def on_generation_prompts_selected(self, *args, **kwargs):
        self.record("selected", *args, **kwargs)

    def on_self_distillation_batch_prepared(self, *args, **kwargs):
        self.record("prepared", *args, **kwargs)

    def on_generation_batch_built(self, *args, **kwargs):
        self.record("built", *args, **kwargs)


def events(**settings):
    payloads = Payloads()
    trainer = make_trainer(callbacks=[payloads], **settings)
    first_step(trainer)
    return dict(payloads.events), trainer, [name for name, _ in payloads.events]


def test_callback_payloads():
    payload, trainer, order = events(gradient_accumulation_steps=2)
    assert order == ["selected", "prepared", "built"]
    selected = payload["selected"]
    assert set(selected) == {"generation_prompts", "generation_prompt_text"}
    assert len(selected["generation_prompts"]) == 4  # 2 rows x 2 micro-batches
    assert selected["generation_prompts"][0] == selected["generation_prompts"][1]
    assert selected["generation_prompts"][0][0]["role"] == "user"
    assert selected["generation_prompt_text"][0].endswith("<|im_start|>assistant\n")
    assert "Hint" not in selected["generation_prompt_text"][0]
    prepared = payload["prepared"]
    assert set(prepared) == {
        "prompt_ids", "completion_ids", "old_per_token_logps", "teacher_input_ids", "teacher_attention_mask"
    }  # fmt: skip
    assert prepared["prompt_ids"].shape[0] == prepared["completion_ids"].shape[0] == 4
    assert trainer.processing_class.decode(prepared["prompt_ids"][0]).endswith("<|im_start|>assistant\n")
    assert prepared["old_per_token_logps"] is None
    teacher_ids, teacher_mask = prepared["teacher_input_ids"], prepared["teacher_attention_mask"]
    rollouts = [r for one in trainer.current_batch.scored for r in one.batch.rollouts]
    for row, mask, rollout in zip(teacher_ids, teacher_mask, sorted(rollouts, key=lambda r: r.row), strict=True):
        assert row[mask.bool()].tolist() == rollout.prompts.teacher.ids + rollout.completion.ids
    assert payload["built"] == {"generate_every": 2, "steps_per_generation": 2}


def test_payloads_that_nobody_listens_to_are_not_made(monkeypatch):
    monkeypatch.setattr(SelfDistillation, "_padded", None)
    first_step(make_trainer())


def test_generation_from_the_teachers_prompt():
    payload, _, _ = events(generate_from_teacher=True, steps_per_generation=2)
    assert all("Hint" in text for text in payload["selected"]["generation_prompt_text"])
    assert payload["prepared"]["old_per_token_logps"] is None


@pytest.mark.parametrize(
    "settings, present",
    [
        ({"steps_per_generation": 2}, True),
        ({"num_iterations": 2}, True),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, False),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, False),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, True),
    ],
)
def test_old_log_probs_are_there_exactly_where_rollouts_get_older_than_the_weights(settings, present):
    payload, trainer, _ = events(temperature=0.7, **settings)
    old = payload["prepared"]["old_per_token_logps"]
    assert (old is not None) == present
    if present:
        assert old.shape == payload["prepared"]["completion_ids"].shape
        trainer.model.eval()
        rollouts = [r for one in trainer.current_batch.scored for r in one.batch.rollouts]
        for row, rollout in zip(old, rollouts, strict=True):
            ids = rollout.completion.ids
            logits = reference.logits_of_completion(trainer.model, rollout.prompts.student.ids, ids, 0.7)
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].detach()
            torch.testing.assert_close(row[: len(ids)], expected, rtol=1e-5, atol=1e-5)
            assert (row[len(ids) :] == 0).all()


def test_a_reused_generation_batch_keeps_its_teacher_and_is_weighted():
    """Over two optimizer steps: the live teacher stays as it was when it scored, head included."""
    trainer = make_trainer(steps_per_generation=2, distillation_is_clip=None, learning_rate=0.1)
    inputs = first_step(trainer)
    teacher = copy.deepcopy(trainer.model).eval()
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    trainer.compute_loss(trainer.model, inputs[0]).backward()
    optimizer.step()
    second = trainer.with_loss_weights([trainer.current_batch.scored[1]])[0]
    assert second["scored"].teacher_head is not None
    loss = trainer.compute_loss(trainer.model, second).item()
    expected = reference.step_loss(
        trainer.model.eval(), teacher, [second["scored"].batch.rollouts], alpha=0.5, topk=100
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)


SPREAD = {"gradient_accumulation_steps": 4, "num_generations": 1, "rows": 8, "max_completion_length": 24}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_rows_of_like_length_share_a_micro_batch_and_the_gradient_stays(monkeypatch, loss_type):
    """The same rows in every optimizer step, in other micro-batches: the same gradient, and less padding."""
    found = []
    for sort in (True, False):
        trainer = make_trainer(loss_type=loss_type, padding_free=False, **SPREAD)
        if not sort:
            monkeypatch.setattr(type(trainer.args), "reordered_batches", 1)
        loss, gradients, inputs = loss_and_gradients(trainer)
        batches = [one["scored"].batch for one in inputs]
        found.append((loss, gradients, sorted(r.row for b in batches for r in b.rollouts), batches))
    (loss, gradients, rows, batches), (plain_loss, plain_gradients, plain_rows, plain_batches) = found
    assert rows == plain_rows == list(range(8))
    assert [[r.row for r in b.rollouts] for b in batches] != [[r.row for r in b.rollouts] for b in plain_batches]
    assert sum(b.padding for b in batches) < sum(b.padding for b in plain_batches)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain_gradients.items():
        assert (gradients[name] - gradient).norm() <= 5e-6 * gradient.norm() + 1e-9


def test_bnpo_keeps_its_micro_batches():
    trainer = make_trainer(loss_type="bnpo", **SPREAD)
    assert [r.row for one in first_step(trainer) for r in one["scored"].batch.rollouts] == list(range(8))


@pytest.mark.parametrize("settings", [{"padding_free": True}, {"teacher_states_device": "cpu"},
                                      {"scoring_batch_tokens": 64}, {"rollout_batch_tokens": 64}])  # fmt: skip
def test_how_a_step_is_computed_does_not_change_its_gradient(settings):
    plain_loss, plain, _ = loss_and_gradients(make_trainer(padding_free=False, **SPREAD))
    trainer = make_trainer(**{"padding_free": False, **SPREAD, **settings})
    if "padding_free" in settings:  # rows of nearly the same length share a line only where lines may be longer
        parts = trainer.objective.parts
        parts.packing = dataclasses.replace(parts.packing, varlen=True)
    loss, gradients, inputs = loss_and_gradients(trainer)
    if "padding_free" in settings:
        assert any(one["scored"].batch.student.position_ids_LT is not None for one in inputs)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9


def test_continuous_batching_trains(monkeypatch):
    """Greedy completions are those of the other backend, from the weights as they are after a step."""
    losses = [
        train(rollout_backend=backend, generation_kwargs={"do_sample": False}, max_steps=3)["losses"]
        for backend in ("generate", "continuous")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_several_end_tokens_each_end_a_completion_and_the_first_is_trained_on():
    model = tiny.llama()
    eos = tiny.tokenizer().eos_token_id
    model.generation_config.eos_token_id = [eos, *range(40)]  # often sampled
    trainer = make_trainer(model=model, max_completion_length=24, per_device_train_batch_size=8)
    (inputs,) = first_step(trainer)
    ended = [r for r in inputs["scored"].batch.rollouts if not r.completion.truncated]
    assert any(r.completion.ids[-1] != eos for r in ended)
    for rollout in ended:
        assert rollout.completion.ids[-1] in (eos, *range(40))
        assert not set(rollout.completion.ids[:-1]) & {eos, *range(40)}
    tokens = inputs["scored"].batch.tokens_N.tolist()
    assert all(r.completion.ids[-1] in tokens for r in ended if not r.empty)


def test_pad_equal_to_eos_does_not_hide_the_end_token():
    tokenizer = tiny.tokenizer()
    model = tiny.llama()
    plain = make_trainer(model=model, max_completion_length=24, per_device_train_batch_size=8)
    tokenizer.pad_token = tokenizer.eos_token
    merged = SDFTTrainer(model=tiny.llama(), args=plain.args, train_dataset=plain.train_dataset,
                         processing_class=tokenizer)  # fmt: skip
    batches = [first_step(trainer)[0]["scored"].batch for trainer in (plain, merged)]
    assert torch.equal(batches[0].tokens_N, batches[1].tokens_N)


def test_rollouts_do_not_depend_on_the_global_generator():
    completions = []
    for seed in (1, 2):
        trainer = make_trainer()
        torch.manual_seed(seed)
        completions.append([r.completion for r in first_step(trainer)[0]["scored"].batch.rollouts])
    assert completions[0] == completions[1]


@pytest.mark.parametrize("strategy, logged", [("steps", [2, 3]), ("epoch", [3]), ("no", [])])
def test_the_last_step_is_logged_as_well(strategy, logged):
    trainer = make_trainer(max_steps=3, logging_strategy=strategy, logging_steps=2)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == logged


def test_training_learns_the_teacher():
    """A frozen teacher that knows more: the student's divergence from it falls."""
    result = train(
        lora=True, max_steps=30, rows=1, num_generations=8, per_device_train_batch_size=8, distillation_alpha=0.0
    )  # fmt: skip
    assert sum(result["losses"][-5:]) < 0.7 * sum(result["losses"][:5])


ANCHORS = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(5)]


@pytest.mark.parametrize(
    "settings",
    [
        {"distillation_alpha": 0.5, "distillation_topk": 20},
        {"loss_type": "grpo", "distillation_mode": "full_logits", "gradient_accumulation_steps": 2},
        {"anchors": ANCHORS, "teacher_model_kind": "base", "num_generations": 1, "anchor_fraction": 0.5},
    ],
)
def test_the_host_waits_once_in_a_micro_batch(settings):
    """Where transformers looks whether a batch without a mask is packed."""
    trainer = make_trainer(**settings, log_completions=0)
    inputs = first_step(trainer)
    with HostSyncs() as syncs:
        for micro_batch in inputs:
            trainer.training_step(trainer.model, micro_batch)
    assert syncs.found == {"_local_scalar_dense": len(inputs)}
    assert trainer.meters["train"].sums["sdft/distillation_loss"][1] > 0


def test_dropout_is_switched_off_also_inside_attention():
    trainer = make_trainer(model=tiny.llama(attention_dropout=0.5), lora=True)
    modules = list(trainer.model.modules())
    with trainer.prepared():
        assert all(m.p == 0 for m in modules if isinstance(m, torch.nn.Dropout))
        assert all(m.attention_dropout == 0 for m in modules if hasattr(m, "attention_dropout"))
    kept = make_trainer(model=tiny.llama(attention_dropout=0.5), disable_dropout=False)
    with kept.prepared():
        assert any(getattr(m, "attention_dropout", 0) == 0.5 for m in kept.model.modules())


def test_the_scoring_pass_leaves_no_trace():
    trainer = make_trainer(lora=True)
    trainer.model.train()
    frozen_mode = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.SiLU) or not list(m.children()))
    frozen_mode.training = False
    before = {n: (m.training,) for n, m in trainer.model.named_modules()}
    requires = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    adapters = trainer.model.active_adapters
    first_step(trainer)
    assert before == {n: (m.training,) for n, m in trainer.model.named_modules()}
    assert requires == {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    assert adapters == trainer.model.active_adapters
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_peft_model_given_as_an_object():
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trainer = make_trainer(model=model)
    assert trainer.args.teacher_model_kind == "base"
    with pytest.raises(ValueError, match="has an adapter already.*continue training"):
        make_trainer(model=model, lora=True)


def test_an_adapter_that_was_trained_before_is_warned_about():
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(param)
    with pytest.warns(UserWarning, match="merge_and_unload"):
        make_trainer(model=model)


def test_a_processor_gives_its_tokenizer():
    class Processor:
        tokenizer = tiny.tokenizer()
        model_input_names = ["input_ids"]

    trainer = make_trainer()
    made = SDFTTrainer(tiny.llama(), trainer.args, trainer.train_dataset, processing_class=Processor())
    assert made.prompts.tokenizer is Processor.tokenizer


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="token id 258.*256 rows"):
        make_trainer(model=tiny.llama(vocab_size=256))


def test_half_precision_weights_without_masters_are_warned_about():
    with pytest.warns(UserWarning, match="bfloat16 and no fp32 master"):
        make_trainer(model=tiny.llama(dtype=torch.bfloat16))


def test_a_model_that_changes_its_logits_is_refused_by_name():
    model = tiny.llama()
    plain = model.forward

    def shifted(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = shifted
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits"):
        first_step(make_trainer(model=model))


def test_saved_model_loads_and_generates(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(max_steps=1, output_dir=str(tmp_path))
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, causal_lm_of(trainer.model).eval()(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 6


def test_metrics_are_in_the_log():
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
    trainer.train()
    train_log = next(log for log in recorder.logs if "loss" in log)
    for name in ("completions/mean_length", "completions/clipped_ratio", "seconds/rollout", "seconds/teacher",
                 "seconds/student", "seconds/optimizer", "tokens/per_second", "tokens/padding_share",
                 "memory/peak_gib", "sdft/distillation_loss"):  # fmt: skip
        assert name in train_log
    assert any("eval_completions/mean_length" in log for log in recorder.logs)


def test_each_evaluation_has_all_of_its_metrics_under_its_own_prefix():
    """Logged and returned; and nothing of another evaluation, or that only training has."""
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], num_iterations=2, per_device_eval_batch_size=2)
    sets = {"a": trainer.eval_dataset.select([0, 1]), "b": trainer.eval_dataset.select(range(2, 6))}
    trainer.eval_dataset = sets
    found = trainer.evaluate()
    assert found.items() <= {name: value for log in recorder.logs for name, value in log.items()}.items()
    assert not [name for name in found if re.search("nonfinite|optimizer|is/|teacher/distance", name)]
    for name, rows in sets.items():
        mine = trainer.evaluate(rows, metric_key_prefix="mine")
        of_set = {key.replace(f"eval_{name}_", "mine_"): value for key, value in found.items() if f"l_{name}_" in key}
        assert of_set.keys() == mine.keys() - {"epoch"}
        sums = {key: value for key, value in of_set.items() if not re.search("second|memory|time", key)}
        assert len(sums) > 12 and sums == {key: mine[key] for key in sums}


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_on_the_head_that_the_loss_cannot_compute_is_refused(adapter):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], **adapter)
    with pytest.raises(ValueError, match="leave `lm_head` out"):
        make_trainer(model=get_peft_model(tiny.llama(tie_word_embeddings=False), config))


@pytest.mark.parametrize("kind", ["live", "base", "ema"])
def test_modules_to_save_beside_the_adapter_are_part_of_the_teacher(kind):
    """A norm that is trained in full: off with the adapter for `base`, averaged for `ema`."""
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["norm"])
    trainer = make_trainer(
        model=get_peft_model(tiny.llama(), adapter), teacher_model_kind=kind, teacher_sync_steps=1, max_steps=4
    )
    start = reference.logits_of_completion(trainer.model.eval(), [1, 2], [3, 4], 1.0).detach()
    trainer.train()
    trainer.model.eval()
    student = reference.logits_of_completion(trainer.model, [1, 2], [3, 4], 1.0).detach()
    with trainer.teacher.weights(trainer.model):
        teacher = reference.logits_of_completion(trainer.model, [1, 2], [3, 4], 1.0).detach()
    assert not torch.allclose(student, start)
    if kind == "base":
        torch.testing.assert_close(teacher, start)
    elif kind == "live":
        torch.testing.assert_close(teacher, student)
    else:
        assert not torch.allclose(teacher, start) and not torch.allclose(teacher, student)
        assert any("norm" in name for name in trainer.teacher.values)


def test_prompt_tuning_is_refused():
    model = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING.*use LoRA"):
        make_trainer(model=model)


def test_no_token_is_saved(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=1, save_strategy="steps", hub_token="hf_secret123")
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret123"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if b"hf_secret123" in path.read_bytes()]


def test_a_divergence_that_runs_away_is_warned_about():
    guard, state = NonFiniteGuard(meters=None, limit=5), TrainerState(global_step=60)
    for value in (0.2, 0.3, 0.2, 0.3, 0.25, 0.9, 1.0):
        guard.on_log(None, state, None, logs={"sdft/distillation_loss": value})
    with pytest.warns(UserWarning, match="sdft/distillation_loss is 4 at step 60"):
        guard.on_log(None, state, None, logs={"sdft/distillation_loss": 4.0})


def test_only_the_collapse_guard_watches_the_length_of_completions(recwarn):
    guard, state = NonFiniteGuard(meters=None, limit=5), TrainerState(global_step=60)
    for length in (*[4.0] * 6, 100.0):
        guard.on_log(None, state, None, logs={"completions/mean_length": length})
    assert not recwarn.list


def test_a_top_k_that_misses_the_teachers_mass_is_warned_about_and_again_when_it_gets_worse():
    def warned(*masses, **settings):
        args, guard = SDFTConfig(**{"distillation_topk": 5, **settings}), NonFiniteGuard(meters=None, limit=5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step, mass in enumerate(masses, 1):
                guard.on_log(args, TrainerState(global_step=step), None, logs={"topk/teacher_mass": mass})
        return [str(each.message) for each in told]

    first, second = warned(0.985, 0.97, 0.95, 0.99, 0.93)
    assert "topk/teacher_mass is 0.97 at step 2: the student's top 5 tokens miss 3%" in first
    assert "distillation_support='union'" in first and "at step 5" in second
    assert not warned(0.5, distillation_add_tail=True)
    assert not warned(0.5, distillation_topk=None, distillation_mode="full_logits")


def test_a_stream_trains_on_its_rows_in_order_and_starts_again():
    seen = []

    class Look(TrainerCallback):
        def on_generation_prompts_selected(self, *args, generation_prompts=None, **kwargs):
            seen.extend(prompt[-1]["content"].split(":")[0] for prompt in generation_prompts)

    make_trainer(stream=True, rows=3, num_generations=1, max_steps=4, callbacks=[Look()]).train()
    assert seen == [f"Question {i % 3}" for i in range(8)]


def test_a_stream_needs_max_steps_and_usable_rows():
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(stream=True, max_steps=-1)
    with pytest.raises(ValueError, match="over max_prompt_length|without a row"):
        make_trainer(stream=True, truncation="drop", max_prompt_length=3).train()


def test_an_evaluation_stream_is_refused():
    dataset = Dataset.from_list(tiny.rows(2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="only train_dataset can be a stream"):
        SDFTTrainer(
            model=tiny.llama(), args=make_trainer().args, eval_dataset=dataset, processing_class=tiny.tokenizer()
        )


@pytest.mark.parametrize("settings", [{"teacher_model_kind": "live"}, {"teacher_model_kind": "base", "lora": True}])
def test_a_teacher_without_weights_of_its_own_is_not_saved(settings):
    with pytest.raises(ValueError, match="no weights of its own"):
        make_trainer(save_teacher=True, **settings)
    with pytest.raises(ValueError, match="cannot be saved: it is the"):
        make_trainer(**settings).save_teacher("nowhere")


def test_after_the_teachers_prompt_the_samplers_log_probabilities_are_not_compared():
    student, both = (train(teacher_rollout_fraction=share, temperature=1.0)["logs"] for share in (0.0, 1.0))
    assert all(log["rollout/logprob_diff_max"] < 1e-3 for log in student)
    assert "rollout/logprob_diff" not in both[0]  # all rows of the first step are the teacher's


def test_a_stream_trains_again_from_its_beginning_and_is_resumed_by_the_same_trainer(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    recorder = Recorder()
    trainer = make_trainer(stream=True, rows=3, num_generations=1, callbacks=[recorder], **settings)
    recorder.trainer = trainer
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.train()
    first, second, again, *anew = [
        [rollout.prompts.student.ids for rows in step for rollout in rows] for step in recorder.rollouts
    ]
    assert again == second != first and anew == [first, second]


def test_generation_batches_of_one_step_share_the_teachers_head(monkeypatch):
    heads = []
    trainer = make_trainer(
        gradient_accumulation_steps=4, steps_per_generation=1, teacher_model_kind="ema", teacher_sync_steps=1,
        teacher_update_rate=0.5, learning_rate=0.01, max_steps=2,
    )  # fmt: skip
    weigh = trainer.with_loss_weights
    monkeypatch.setattr(
        trainer, "with_loss_weights", lambda scored: heads.append([s.teacher_head for s in scored]) or weigh(scored)
    )
    trainer.train()
    (first, *others), (second, *_) = heads
    assert others == [first] * 3 and not torch.equal(first.weight_VD, second.weight_VD)


def test_an_evaluation_inside_a_step_leaves_the_step_as_it_is():
    class Evaluate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.trainer.evaluate()

        on_substep_end = on_step_begin

    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "callbacks": [Evaluate()]}
    trainer = make_trainer(**settings)
    settings["callbacks"][0].trainer = trainer
    plain = make_trainer(**{**settings, "callbacks": []})
    for each in (trainer, plain):
        each.train()
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (trainer, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_an_evaluation_drops_a_generation_batch_that_is_used_up(monkeypatch):
    kept = []
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1, steps_per_generation=2)
    loop = trainer.evaluation_loop
    monkeypatch.setattr(
        trainer, "evaluation_loop", lambda *a, **k: kept.append(trainer.current_batch is not None) or loop(*a, **k)
    )
    trainer.train()
    assert kept == [True, False]
