import torch

from sdft_ds.paired_batch import Completion, LossMask, Rollout, pad_left, pad_right, pair
from sdft_ds.prompts import PromptPair, RenderedPrompt

PAD, CPU = 0, torch.device("cpu")


def rollout(student, teacher, completion, truncated=False, counted=True, row=0):
    render = lambda ids: RenderedPrompt("", "", ids)  # noqa: E731
    return Rollout(row, PromptPair(render(student), render(teacher)), Completion(completion, truncated), counted)


def predicted(view, tokens):
    """The token that stands right after each position: what the logits there predict."""
    flat = view.input_ids_RT.flatten()
    return flat[view.positions_N + 1].tolist() == tokens


def test_student_and_teacher_align_token_by_token():
    rollouts = [rollout([1, 2], [1, 2, 3, 4], [11, 12, 13]), rollout([5, 6, 7], [5], [14])]
    batch = pair(rollouts, LossMask(), PAD, CPU)
    # A completion of one token that ended by itself is empty, and has no loss.
    assert batch.tokens_N.tolist() == [11, 12, 13] and batch.rows_N.tolist() == [0, 0, 0]
    assert predicted(batch.student, [11, 12, 13]) and predicted(batch.teacher, [11, 12, 13])
    assert batch.student.input_ids_RT.tolist() == [[1, 2, 11, 12, 13], [5, 6, 7, 14, PAD]]
    assert batch.student.attention_mask_RT.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]


def test_skip_takes_tokens_out_of_the_loss_and_leaves_them_visible():
    rollouts = [
        rollout([1], [1, 2], [11, 12, 13]),
        rollout([1, 2], [3], [14, 15, 16, 17]),
        rollout([1], [2], [18, 19]),
    ]
    batch = pair(rollouts, LossMask(skip=2), PAD, CPU)
    assert batch.tokens_N.tolist() == [13, 16, 17] and batch.rows_N.tolist() == [0, 1, 1]
    assert predicted(batch.student, [13, 16, 17]) and predicted(batch.teacher, [13, 16, 17])
    whole = pair(rollouts, LossMask(), PAD, CPU)
    assert torch.equal(batch.student.attention_mask_RT, whole.student.attention_mask_RT)
    assert torch.equal(batch.teacher.attention_mask_RT, whole.teacher.attention_mask_RT)


def test_truncated_completions_can_be_masked():
    rollouts = [rollout([1], [2], [11, 12], truncated=True), rollout([1], [2], [13, 14])]
    assert pair(rollouts, LossMask(), PAD, CPU).tokens_N.tolist() == [11, 12, 13, 14]
    assert pair(rollouts, LossMask(mask_truncated=True), PAD, CPU).tokens_N.tolist() == [13, 14]


def test_duplicates_that_do_not_count_have_no_loss():
    batch = pair([rollout([1], [2], [11, 12], counted=False)], LossMask(), PAD, CPU)
    assert batch.tokens_N.shape == (0,) and batch.student.positions_N.shape == (0,)


def test_a_single_truncated_token_is_not_empty():
    assert rollout([1], [2], [11]).empty
    assert not rollout([1], [2], [11], truncated=True).empty


def test_padding():
    ids, mask = pad_left([[1], [2, 3]], PAD, CPU)
    assert ids.tolist() == [[0, 1], [2, 3]] and mask.tolist() == [[0, 1], [1, 1]]
    assert pad_right([[1], [2, 3]], PAD, CPU).tolist() == [[1, 0], [2, 3]]
