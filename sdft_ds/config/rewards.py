"""Settings of methods with rewards: teacher prompts of successful completions and feedback, and the policy loss."""

from dataclasses import dataclass
from typing import Literal

from sdft_ds.config.fields import FREE, WITH_REWARDS, at_least, finite, positive, setting, unused, within


@dataclass
class RewardSettings:
    use_successful_as_teacher: bool = setting(
        True,
        "Show the teacher a successful completion of the same prompt: the first one.",
        resume=FREE,
        read_by=WITH_REWARDS,
        card=True,
    )
    success_reward_threshold: float = setting(
        1.0, "The least reward of a successful completion.", resume=FREE, read_by=WITH_REWARDS, card=True
    )
    dont_reprompt_on_self_success: bool = setting(
        True, "Do not show the teacher of a completion that completion itself.", resume=FREE, read_by=WITH_REWARDS
    )
    max_reprompt_len: int = setting(
        10240,
        "Most tokens of a teacher's prompt with a completion or feedback, which is cut to fit. See also "
        "max_teacher_prompt_length.",
        valid=positive(),
        resume=FREE,
        read_by=WITH_REWARDS,
    )
    reprompt_template: str = setting(
        "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n",
        "The teacher's prompt, of the prompt and the two templates that follow; each is empty where there is nothing.",
        resume=FREE,
        read_by=WITH_REWARDS,
        card=True,
    )
    solution_template: str = setting(
        "\nCorrect solution:\n\n{successful_previous_attempt}\n\n",
        "What the teacher sees of a successful completion.",
        resume=FREE,
        read_by=WITH_REWARDS,
        card=True,
    )
    feedback_template: str = setting(
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n",
        "What the teacher sees of feedback.",
        resume=FREE,
        read_by=WITH_REWARDS,
        card=True,
    )
    include_environment_feedback: bool = setting(
        False,
        "Show the teacher feedback: what privileged_context_fn returns, or the row's privileged context.",
        resume=FREE,
        read_by=WITH_REWARDS,
        card=True,
    )
    environment_feedback_only_without_solution: bool = setting(
        False,
        "But only where no completion of the prompt was successful.",
        only_with=("include_environment_feedback",),
        resume=FREE,
        read_by=WITH_REWARDS,
    )
    remove_thinking_from_demonstration: bool = setting(
        False, "Show successful completions without <think>...</think>.", resume=FREE, read_by=WITH_REWARDS
    )
    reward_errors: Literal["error", "skip"] = setting(
        "error",
        "A reward function that raises, takes too long, or returns no finite number for a completion: end the run, or "
        "leave that reward unknown, counted: no success, and no part in the policy loss.",
        resume=FREE,
        read_by=WITH_REWARDS,
    )
    reward_timeout: float | None = setting(
        None,
        "Seconds after which a call of a reward function, with all completions of a rank, takes too long.",
        valid=positive(),
        resume=FREE,
        read_by=WITH_REWARDS,
    )


@dataclass
class PolicySettings:
    """Settings of the policy loss, which other methods accept at their defaults only."""

    epsilon: float = setting(
        0.2, "Policy loss: how far a probability ratio counts below 1.", valid=within(0, 1), resume=FREE,
        read_by=WITH_REWARDS,
    )  # fmt: skip
    epsilon_high: float | None = setting(
        None, "And above 1. Unset: epsilon.", valid=at_least(0), resume=FREE, read_by=WITH_REWARDS
    )
    beta: float = unused(0.0, "there is no divergence from a reference model beside the teacher's")
    importance_sampling_level: str = unused("token", "each token has a probability ratio of its own")
    reward_weights: list[float] | None = setting(
        None, "Weight of each reward function in the sum. Unset: 1.", valid=finite(), resume=FREE,
        read_by=WITH_REWARDS,
    )  # fmt: skip
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group",
        "The standard deviation that advantages are divided by: of the completions of a prompt, of all, or none.",
        resume=FREE,
        read_by=WITH_REWARDS,
    )
