"""SDFT written out plainly: one row at a time, whole logits, no padding, autograd.

What the trainer is tested against.
"""

import torch
import torch.nn.functional as F

from sdft_ds.divergence import interpolated_divergence


def logits_of_completion(model, prompt_ids, completion_ids, temperature):
    """[C, V]: what predicts each completion token."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits[len(prompt_ids) - 1 : -1] / temperature


def per_token(student, teacher, alpha, topk=None, tail=False):
    """[C] from logits."""
    s, t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if topk is not None:
        top = s.topk(topk, dim=-1).indices
        s_top, t_top = s.gather(-1, top), t.gather(-1, top)
        if tail:
            rest = lambda x: torch.log1p(-x.exp().sum(-1, keepdim=True))  # noqa: E731
            s, t = torch.cat([s_top, rest(s_top)], -1), torch.cat([t_top, rest(t_top)], -1)
        else:
            s, t = s_top.log_softmax(-1), t_top.log_softmax(-1)
    return interpolated_divergence(s, t, alpha)


def step_loss(
    student, teacher, micro_batches, loss_type="dapo", alpha=0.5, topk=None, tail=False, skip=0, temperature=1.0,
    max_completion_length=8, mask_truncated=False,
):  # fmt: skip
    """The loss of one optimizer step. micro_batches: lists of Rollout; bnpo's are those of all ranks together."""
    sums, counts = [], []
    for rollouts in micro_batches:
        sums.append([])
        counts.append([])
        for rollout in rollouts:
            ids = rollout.completion.ids
            with torch.no_grad():
                t = logits_of_completion(teacher, rollout.prompts.teacher.ids, ids, temperature)
            s = logits_of_completion(student, rollout.prompts.student.ids, ids, temperature)
            mask = torch.arange(len(ids)) >= skip
            if rollout.empty or (mask_truncated and rollout.completion.truncated):
                mask[:] = False
            sums[-1].append((per_token(s, t, alpha, topk, tail) * mask).sum())
            counts[-1].append(int(mask.sum()))
    all_sums, all_counts = [x for row in sums for x in row], [n for row in counts for n in row]
    if loss_type == "dapo":
        return sum(all_sums) / sum(all_counts)
    if loss_type == "grpo":
        return sum(x / max(n, 1) for x, n in zip(all_sums, all_counts, strict=True)) / len(all_sums)
    if loss_type == "dr_grpo":
        return sum(all_sums) / (len(all_sums) * max_completion_length)
    return sum(sum(s) / max(sum(n), 1) for s, n in zip(sums, counts, strict=True)) / len(sums)
