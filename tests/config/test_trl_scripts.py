"""Scripts as they are written for TRL's trl.experimental.sdft, with nothing but the import changed."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from sdft_ds import SDFTConfig, SDFTTrainer
from sdft_ds.config.recipes import recipe
from tests.helpers import tiny, trl_run


@pytest.fixture
def model_folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def settings(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2,
        "max_completion_length": 8, "report_to": "none", "bf16": False, "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip


class Watch(TrainerCallback):
    """Events are called with keywords only, as TRL calls them."""

    def __init__(self):
        self.seen = {}

    def on_generation_prompts_selected(self, **kwargs):
        self.seen["selected"] = kwargs

    def on_self_distillation_batch_prepared(self, *, args, state, teacher_input_ids, teacher_attention_mask, **kwargs):
        assert teacher_input_ids.shape == teacher_attention_mask.shape
        self.seen["prepared"] = kwargs

    def on_generation_batch_built(self, args, state, control, generate_every=None, **kwargs):
        self.seen["built"] = generate_every


@pytest.mark.parametrize("version", ["trl", "trl-1.16"])
def test_the_shortest_script(model_folder, tmp_path, version):
    """One row, a model by name, and little more than defaults, as in a first example: 8 completions of the one prompt
    in each of 3 epochs."""
    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "What is the capital of Atlantis?"}]],
            "privileged_context": ["A good answer: Poseidonis."],
        }
    )
    args = SDFTConfig(
        **recipe(version) | dict(output_dir=str(tmp_path / "sdft"), distillation_topk=5, max_completion_length=6)
    )
    trainer = SDFTTrainer(model=model_folder, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 3 and (tmp_path / "sdft" / "model.safetensors").exists()
    assert trainer.args.teacher_model_kind == {"trl": "live", "trl-1.16": "base"}[version]


def test_a_script_for_1_5_1(model_folder, tmp_path):
    args = SDFTConfig(
        **settings(tmp_path), sync_ref_model=True, ref_model_mixup_alpha=0.1, ref_model_sync_steps=1,
        full_logit_distillation=True, distillation_topk=None, distillation_alpha=0.0, beta=0.0, loss_type="dapo",
        mask_truncated_completions=True, diagnostics_warning_interval=10,
    )  # fmt: skip
    watch = Watch()
    trainer = SDFTTrainer(
        model=model_folder, args=args, train_dataset=Dataset.from_list(tiny.rows()), callbacks=[watch]
    )
    trainer.train()
    assert trainer.state.global_step == 1 and watch.seen.keys() == {"selected", "prepared", "built"}
    assert trainer.args.teacher_model_kind == "ema"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_script_for_1_16(model_folder, tmp_path, streaming):
    """1.16 itself refuses streams; here they train."""
    args = SDFTConfig(
        **recipe("trl-1.16") | settings(tmp_path), trust_remote_code=True, use_teacher_server=False,
        distillation_is_clip=2.0, generate_from_teacher=False, steps_per_generation=2,
    )  # fmt: skip
    dataset = Dataset.from_list(tiny.rows())
    watch = Watch()
    trainer = SDFTTrainer(
        model=model_folder,
        args=args,
        train_dataset=dataset.to_iterable_dataset() if streaming else dataset,
        processing_class=tiny.tokenizer(),
        callbacks=[watch],
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 1 and watch.seen["built"] == 2
    assert trainer.args.teacher_model_kind == "base" and trainer.args.loss_type == "grpo"


def of(events, name):
    return [given for event, given in events if event == name]


def test_what_callbacks_are_given(tmp_path):
    """Names, order, shapes, dtypes and padding are those of TRL 1.16, of whose payload 1.5.1's is a part; with TRL
    installed tests/config/test_trl_side_by_side.py compares the values. Generation batches are used twice, so that
    there are log-probabilities of before."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    more = {"generation_kwargs": None, "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 3}
    run = trl_run.train("sdft_ds", str(tmp_path / "model"), str(tmp_path / "out"), more, "trl-1.16")
    selected, prepared, built = trl_run.EVENTS
    # Steps 1 and 2, step 3, and an evaluation, of all its rows together.
    assert [event for event, _ in run["events"]] == [*(selected, prepared, built) * 2, selected, prepared]
    pad = 257
    for given in of(run["events"], selected):
        assert given.keys() == {"generation_prompts", "generation_prompt_text"}
        assert given["generation_prompts"][0][1]["content"].startswith("Question")
        assert {text.count("<|im_start|>") for text in given["generation_prompt_text"]} == {3}
    assert [len(given["completion_ids"]) for given in of(run["events"], prepared)] == [4, 4, 8]
    for given in of(run["events"], prepared):
        old, completions = given.pop("old_per_token_logps"), given["completion_ids"]
        assert list(given) == ["prompt_ids", "completion_ids", "teacher_input_ids", "teacher_attention_mask"]
        assert all(tensor.dtype == torch.int64 for tensor in given.values())
        assert old.shape == completions.shape and old.dtype == torch.float32 and bool((old <= 0).all())
        ids, mask = given["teacher_input_ids"], given["teacher_attention_mask"]
        width = ids.shape[1] - completions.shape[1]
        left, right = mask[:, :width], mask[:, width:]
        assert torch.equal(ids[:, width:], completions) and bool((ids[mask == 0] == pad).all())
        # Padded on the left and on the right; a random model samples the padding token, too.
        assert bool((left.diff() >= 0).all()) and bool((right.diff() <= 0).all()) and bool((left[:, -1] == 1).all())
        assert torch.equal(ids[:, :width] != pad, left == 1) and bool((right[:, 0] == 1).all())
        assert bool((given["prompt_ids"][:, -1] != pad).all()) and bool((given["prompt_ids"][:, 0] == pad).any())
    for given in of(run["events"], built):
        assert given == {"generate_every": 2, "steps_per_generation": 1}


def test_what_1_16_has_and_this_does_not_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="use_teacher_server=True would have no effect here: .*Leave it at .* False"):
        SDFTConfig(**settings(tmp_path), use_teacher_server=True)


def test_an_ema_teacher_that_is_never_updated_is_told(model_folder, tmp_path):
    args = SDFTConfig(**settings(tmp_path), sync_ref_model=True)
    trainer = SDFTTrainer(model=model_folder, args=args, train_dataset=Dataset.from_list(tiny.rows()))
    with pytest.warns(UserWarning, match="will never be updated: .*teacher_sync_steps=512 steps, and the run has 1"):
        trainer.train()
