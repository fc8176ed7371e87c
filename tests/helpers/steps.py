"""One optimizer step of a trainer, taken apart and compared with the plain loop of `reference`."""

import copy

import pytest
import torch
from peft import PeftModel

from tests.helpers import reference


def first_step(trainer):
    """(micro-batches as compute_loss gets them) of the first optimizer step."""
    loader = trainer.get_train_dataloader()
    with trainer.prepared():
        trainer.check_head()
    inputs, _ = trainer.get_batch_samples(iter(loader), trainer.args.gradient_accumulation_steps, torch.device("cpu"))
    return inputs


def loss_and_gradients(trainer):
    inputs = first_step(trainer)
    trainer.model.train()
    loss = 0.0
    for one in inputs:
        part = trainer.compute_loss(trainer.model, one)
        part.backward()
        loss += part.item()
    return loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, inputs


def check_against_the_reference(trainer, within):
    """Loss and gradients of the first step are those of a literal second model as the teacher."""
    loss, gradients, inputs = loss_and_gradients(trainer)
    student, teacher = trainer.model, copy.deepcopy(trainer.model)
    student.zero_grad()
    student.eval()
    teacher.eval()
    if isinstance(student, PeftModel):
        teacher = teacher.unload()
    args = trainer.args
    expected = reference.step_loss(
        student,
        teacher,
        [one["scored"].batch.rollouts for one in inputs],
        loss_type=args.loss_type,
        alpha=args.distillation_alpha,
        topk=args.distillation_topk,
        tail=args.distillation_add_tail,
        skip=args.num_loss_tokens_to_skip,
        temperature=args.temperature,
        max_completion_length=args.max_completion_length,
        mask_truncated=args.mask_truncated_completions,
        support=args.distillation_support,
        teacher_temperature=args.teacher_temperature,
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=within)
    reference_gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference_gradients.keys() and gradients
    for name, gradient in gradients.items():
        wanted = reference_gradients[name]
        assert (gradient - wanted).norm() <= within * wanted.norm() + 1e-9, name
