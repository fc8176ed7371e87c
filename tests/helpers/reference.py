"""SDFT written out plainly: one row at a time, whole logits, no padding, autograd.

What the trainer is tested against.
"""

import copy

import torch
import torch.nn.functional as F

from sdft_ds.loss.divergence import interpolated_divergence


def logits_of_completion(model, prompt_ids, completion_ids, temperature):
    """[C, V]: what predicts each completion token."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits[len(prompt_ids) - 1 : -1] / temperature


def per_token(student, teacher, alpha, topk=None, tail=False, support="student"):
    """[C] from logits."""
    s, t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if topk is not None and support != "student":
        rows = [per_row(*row, alpha, topk, tail, support) for row in zip(s, t, strict=True)]
        return torch.stack(rows) if rows else s.sum(-1)
    if topk is not None:
        top = s.topk(topk, dim=-1).indices
        s_top, t_top = s.gather(-1, top), t.gather(-1, top)
        if tail:
            rest = lambda x: torch.log1p(-x.exp().sum(-1, keepdim=True))  # noqa: E731
            s, t = torch.cat([s_top, rest(s_top)], -1), torch.cat([t_top, rest(t_top)], -1)
        else:
            s, t = s_top.log_softmax(-1), t_top.log_softmax(-1)
    return interpolated_divergence(s, t, alpha)


def per_row(s, t, alpha, topk, tail, support):
    """One token, on a set of tokens."""
    sides = {"teacher": [t], "union": [s, t]}[support]
    chosen = sorted({int(token) for side in sides for token in side.topk(topk).indices})
    others = [token for token in range(len(s)) if token not in chosen]

    def buckets(side):
        kept = side[chosen]
        return torch.cat([kept, side[others].logsumexp(-1, keepdim=True)]) if tail and others else kept

    return interpolated_divergence(buckets(s).log_softmax(-1), buckets(t).log_softmax(-1), alpha)


def step_loss(
    student, teacher, micro_batches, loss_type="dapo", alpha=0.5, topk=None, tail=False, skip=0, temperature=1.0,
    max_completion_length=8, mask_truncated=False, support="student", start=None, teacher_temperature=1.0,
):  # fmt: skip
    """The loss of one optimizer step. micro_batches: lists of Rollout; bnpo's are those of all ranks together. start:
    the teacher of anchors, where it is another model."""
    sums, counts = [], []
    for rollouts in micro_batches:
        sums.append([])
        counts.append([])
        for rollout in rollouts:
            ids = rollout.completion.ids
            held_to = start if rollout.prompts.anchor and start is not None else teacher
            with torch.no_grad():
                t = logits_of_completion(held_to, rollout.prompts.teacher.ids, ids, temperature)
                t /= 1.0 if rollout.prompts.anchor else teacher_temperature
            s = logits_of_completion(student, rollout.prompts.student.ids, ids, temperature)
            mask = torch.arange(len(ids)) >= skip
            left_out = not rollout.prompts.anchor and rollout.prompts.teacher.ids == rollout.prompts.student.ids
            if rollout.empty or left_out or (mask_truncated and rollout.completion.truncated):
                mask[:] = False
            sums[-1].append((per_token(s, t, alpha, topk, tail, support) * mask).sum())
            counts[-1].append(int(mask.sum()))
    all_sums, all_counts = [x for row in sums for x in row], [n for row in counts for n in row]
    if loss_type == "dapo":
        return sum(all_sums) / sum(all_counts)
    if loss_type == "grpo":
        return sum(x / max(n, 1) for x, n in zip(all_sums, all_counts, strict=True)) / len(all_sums)
    if loss_type == "dr_grpo":
        return sum(all_sums) / (len(all_sums) * max_completion_length)
    return sum(sum(s) / max(sum(n), 1) for s, n in zip(sums, counts, strict=True)) / len(sums)


class WithoutAdapter:
    """A PEFT model as it is with its adapters off."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        with self.model.disable_adapter():
            return self.model(*args, **kwargs)

    def named_parameters(self):
        return self.model.named_parameters()


def train(student, rollouts_by_step, kind, lora=False, rate=0.6, sync_steps=512, lr=1e-2, eps=1e-3, clip=1.0, **loss):
    """Train with a literal second model as the teacher; (losses, gradient norms, teacher) over the given rollouts."""
    student.eval()
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss["start"] = WithoutAdapter(teacher) if lora else None
    if lora and kind == "base":
        teacher = WithoutAdapter(teacher)
    trained = {name: param for name, param in student.named_parameters() if param.requires_grad}
    decay = [p for n, p in trained.items() if p.ndim > 1]
    rest = [p for n, p in trained.items() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest}], lr=lr, eps=eps, weight_decay=0.0)
    losses, norms = [], []
    for step, micro_batches in enumerate(rollouts_by_step, start=1):
        now = copy.deepcopy(student).requires_grad_(False) if kind == "live" else teacher
        value = step_loss(student, now, micro_batches, **loss)
        optimizer.zero_grad()
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), clip).item())
        losses.append(value.item())
        optimizer.step()
        if kind == "ema" and step % sync_steps == 0:
            with torch.no_grad():
                for name, param in teacher.named_parameters():
                    if name in trained:
                        param.copy_((1 - rate) * param + rate * trained[name])
    return losses, norms, student if kind == "live" else teacher
