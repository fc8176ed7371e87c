import torch

from sdft_ds.data.batch import Completion, LossMask, Rollout, bucket_by_length, collate, pad_left, pad_right
from sdft_ds.data.prompts import PromptPair, RenderedPrompt

PAD, CPU = 0, torch.device("cpu")


def rollout(student, teacher, completion, truncated=False, counted=True, row=0):
    render = lambda ids: RenderedPrompt("", "", ids)  # noqa: E731
    return Rollout(row, PromptPair(render(student), render(teacher)), Completion(completion, truncated), counted)


def predicted(view, tokens):
    """The token that stands right after each position: what the logits there predict."""
    flat = view.input_ids_LT.flatten()
    return flat[view.positions_N + 1].tolist() == tokens


def test_positions_are_those_that_predict_the_completion():
    rollouts = [rollout([1, 2], [9], [11, 12, 13]), rollout([5, 6, 7], [9], [14])]
    batch = collate(rollouts, LossMask(), PAD, CPU)
    # A completion of one token that ended by itself is empty, and has no loss.
    assert batch.tokens_N.tolist() == [11, 12, 13] and batch.rows_N.tolist() == [0, 0, 0]
    assert predicted(batch.student, [11, 12, 13])
    assert batch.student.input_ids_LT.tolist() == [[1, 2, 11, 12, 13], [5, 6, 7, 14, PAD]] and batch.padding == 1


def test_rows_on_one_line_hold_the_same():
    rollouts = [rollout([1, 2], [9], [11, 12, 13]), rollout([5], [9], [14, 15]), rollout([6, 7, 8], [9], [16, 17])]
    plain = collate(rollouts, LossMask(skip=1), PAD, CPU)
    packed = collate(rollouts, LossMask(skip=1), PAD, CPU, lambda lengths: [[2], [1, 0]])
    assert packed.student.input_ids_LT.tolist() == [[6, 7, 8, 16, 17, 0, 0, 0], [5, 14, 15, 1, 2, 11, 12, 13]]
    assert packed.student.position_ids_LT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert predicted(packed.student, [12, 13, 15, 17]) and packed.padding == 3
    assert torch.equal(packed.tokens_N, plain.tokens_N) and torch.equal(packed.rows_N, plain.rows_N)


def test_skip_takes_tokens_out_of_the_loss_and_leaves_them_visible():
    rollouts = [
        rollout([1], [1, 2], [11, 12, 13]),
        rollout([1, 2], [3], [14, 15, 16, 17]),
        rollout([1], [2], [18, 19]),
    ]
    batch = collate(rollouts, LossMask(skip=2), PAD, CPU)
    assert batch.tokens_N.tolist() == [13, 16, 17] and batch.rows_N.tolist() == [0, 1, 1]
    assert predicted(batch.student, [13, 16, 17])
    assert torch.equal(batch.student.input_ids_LT, collate(rollouts, LossMask(), PAD, CPU).student.input_ids_LT)


def test_rows_of_like_length_come_together_within_their_optimizer_step():
    rollouts = [rollout([1] * n, [2], [3, 4], row=i) for i, n in enumerate((1, 9, 2, 8, 5, 3, 4, 6))]
    lengths = lambda batches: [[len(r.prompts.student.ids) for r in batch] for batch in batches]  # noqa: E731
    assert lengths(bucket_by_length(rollouts, 2, 2)) == [[9, 8], [2, 1], [6, 5], [4, 3]]
    assert lengths(bucket_by_length(rollouts, 2, 4)) == [[9, 8], [6, 5], [4, 3], [2, 1]]
    assert lengths(bucket_by_length(rollouts, 2, 1)) == [[1, 9], [2, 8], [5, 3], [4, 6]]


def test_truncated_completions_can_be_masked():
    rollouts = [rollout([1], [2], [11, 12], truncated=True), rollout([1], [2], [13, 14])]
    assert collate(rollouts, LossMask(), PAD, CPU).tokens_N.tolist() == [11, 12, 13, 14]
    assert collate(rollouts, LossMask(mask_truncated=True), PAD, CPU).tokens_N.tolist() == [13, 14]


def test_duplicates_that_do_not_count_have_no_loss():
    batch = collate([rollout([1], [2], [11, 12], counted=False)], LossMask(), PAD, CPU)
    assert batch.tokens_N.shape == (0,) and batch.student.positions_N.shape == (0,)


def test_a_single_truncated_token_is_not_empty():
    assert rollout([1], [2], [11]).empty
    assert not rollout([1], [2], [11], truncated=True).empty


def test_padding():
    ids, mask = pad_left([[1], [2, 3]], PAD, CPU)
    assert ids.tolist() == [[0, 1], [2, 3]] and mask.tolist() == [[0, 1], [1, 1]]
    assert pad_right([[1], [2, 3]], PAD, CPU).tolist() == [[1, 0], [2, 3]]
