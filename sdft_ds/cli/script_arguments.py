"""Flags of the command line alone, beside SDFTConfig's and the model's: method, data set, columns, questions."""

from dataclasses import dataclass, field
from typing import Literal

from sdft_ds.config import recipes
from sdft_ds.config.fields import Range, at_least, check_ranges, setting
from sdft_ds.data.loading.file_kinds import display
from sdft_ds.data.loading.formats import AUTO, DEMONSTRATION_TEMPLATE, FORMATS
from sdft_ds.trainer import TRAINERS

# The demo has rows of its own.
OF_DATA = ("dataset_path or dataset_name",)


@dataclass
class ScriptArguments:
    """Method and recipe, data set and column mapping, and evaluation tasks."""

    _argument_group_name = "method and data"

    method: str = setting(
        "sdft",
        "sdft: self-distillation; sdpo: the same with rewarded completions as the context (--reward); sft: supervised "
        "fine-tuning on the demonstrations of the same rows, to compare.",
        choices=tuple(TRAINERS),
    )
    recipe: str | None = setting(
        None,
        f"A preset of settings, which explicit settings override: {', '.join(recipes.RECIPES)}. facts: what taught a "
        "small model most in few steps, with anchors against forgetting; it applies where no recipe is named. paper: "
        "forward KL, full vocabulary, EMA teacher; trl: SDFTConfig's defaults, which are TRL 1.5.1's; trl-1.16: those "
        "of TRL 1.16.",
    )
    dataset_name: str | None = setting(None, "A data set on the Hugging Face hub.")
    dataset_config: str | None = setting(None, "Its configuration.")
    dataset_revision: str | None = setting(None, "Its branch, tag or commit.")
    dataset_path: list[str] | None = setting(
        None,
        "A data set on disk: a save_to_disk folder; or json, jsonl, csv, tsv (also .gz), parquet or arrow files: one, "
        "several, a pattern, or a folder of them.",
    )
    dataset_format: str = setting(
        AUTO,
        "The format of its rows; auto: recognised by the columns, and printed. A --..._column that is set wins.",
        choices=(AUTO, *FORMATS),
        only_with=OF_DATA,
    )
    dataset_train_split: str = setting("train", "The split to train on.", only_with=OF_DATA)
    dataset_test_split: str = setting(
        "test", "The split to evaluate on, where eval_strategy asks for it.", only_with=OF_DATA
    )
    eval_fraction: float | None = setting(
        None,
        "Evaluate on this share of the training split, chosen by the seed and not trained on, instead.",
        valid=Range(lambda value: 0 < value < 1, "in (0, 1)"),
        only_with=OF_DATA,
    )
    dataset_streaming: bool = setting(
        False,
        "Read the training split as a stream, in its order, without loading it; needs --max_steps.",
        only_with=OF_DATA,
    )
    prompt_column: str | None = setting(
        None,
        "Column that holds the prompt: text, or a conversation. Each column that is unset is the format's.",
        only_with=OF_DATA,
    )
    prompt_as: Literal["user", "text"] | None = setting(
        None,
        "How a plain-text prompt is read: user, as the user's turn of a conversation; text, as it is. Unset: user "
        "where the tokenizer has a chat template.",
        only_with=OF_DATA,
    )
    system_column: str | None = setting(
        None,
        "Column that holds a system message; the prompt's text then becomes the user's turn of a conversation.",
        only_with=OF_DATA,
    )
    privileged_context_column: str | None = setting(
        None, "Column that holds what only the teacher sees: text, or messages.", only_with=OF_DATA
    )
    teacher_prompt_column: str | None = setting(
        None,
        "Column that holds what the teacher sees in place of the filled template, where it is set.",
        only_with=OF_DATA,
    )
    tools_column: str | None = setting(
        None, "Column that holds function schemas for the chat template, or their JSON.", only_with=OF_DATA
    )
    golden_response_column: str | None = setting(
        None,
        "Column that holds a demonstration, used where a row has no privileged context, and by method sft.",
        only_with=OF_DATA,
    )
    demonstration_template: str = setting(
        DEMONSTRATION_TEMPLATE,
        "Makes the privileged context from a golden response: $output_text is the response, $orig_content the prompt.",
        only_with=OF_DATA,
    )
    privileged_context_fn: str | None = setting(
        None,
        "A function of yours, package.module:function, that makes privileged contexts after the rollout: called with "
        "prompts, completions and rows, it returns a text or None for each.",
        only_with=OF_DATA,
    )
    reward: list[str] | None = setting(
        None,
        "For --method sdpo: reward functions, each package.module:function, or the name of a scorer (exact, contains, "
        "choice, answer_letter, regex, action), which gives 1 to a right completion.",
        only_with=OF_DATA,
    )
    answer_column: str = setting("answer", "Column that holds the answer, for those scorers.", only_with=("reward",))
    anchor_path: list[str] | None = setting(
        None,
        "Prompts without context on which the student is held to the model at the start, so that it does not forget: "
        "files or a folder, as dataset_path; everyday: prompts of everyday use that come with this program; none. Of "
        "each row only the prompt is read, and for --method sft its golden response. See anchor_fraction.",
    )
    teacher_check_rows: int = setting(
        4,
        "Rows by which the teacher is checked before the first step of SDFT: the answers with and without the "
        "context, and a verdict. 0: none. A stream, and contexts made after the rollout, are not checked.",
        valid=at_least(0),
        only_with=OF_DATA,
    )
    eval_num_prompts: int | None = setting(
        8,
        "Evaluation prompts whose completions are printed after training; 0: none.",
        valid=at_least(0),
        only_with=(*OF_DATA, "eval_strategy"),
    )
    eval_tasks: list[str] | None = setting(
        None,
        "Questions asked before and after training: JSON Lines files with prompt and answer, each FILE, NAME=FILE or "
        "NAME=FILE:SCORER; scorers: exact, contains, choice, answer_letter, regex, action.",
    )
    eval_tasks_steps: int | None = setting(
        None, "Evaluate them, and the retention set, every N steps as well.", valid=at_least(1)
    )
    eval_task_rows: int | None = setting(None, "Use only the first N rows of each file.", valid=at_least(1))
    retention_file: str | None = setting(
        None, "Prompts, and answers if there are any, on which the model is compared with the starting model."
    )

    rate_of_recipe: bool = field(default=False, init=False)  # the learning rate is the recipe's, for the model's width
    recipe_unnamed: bool = field(default=False, init=False)
    # Names of the settings on the command line, and of those of the file that are not at their defaults.
    given: tuple[str, ...] = field(default=(), init=False)

    @property
    def source(self) -> str:
        """Display name of the data set."""
        if self.dataset_name is not None:
            return self.dataset_name
        return display(self.dataset_path or ["in memory"])

    @property
    def makes_contexts(self) -> bool:
        """Whether privileged contexts are made after the rollout, so that rows may lack one."""
        return self.method == "sdpo" or self.privileged_context_fn is not None

    def reads_prompts_as_turns(self, has_chat_template: bool) -> bool:
        """Whether a plain-text prompt, of a row or a question, becomes the user's turn of a conversation."""
        return self.prompt_as == "user" or (self.prompt_as is None and has_chat_template)

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range, and for settings that contradict each other."""
        check_ranges(self)
        if self.dataset_path and self.dataset_name:
            raise ValueError("--dataset_path and --dataset_name are both set: give one of them.")
        for name in ("dataset_config", "dataset_revision"):
            if getattr(self, name) is not None and self.dataset_name is None:
                raise ValueError(f"--{name} needs --dataset_name: a data set on disk has none.")
        if self.eval_fraction is not None and self.dataset_streaming:
            raise ValueError(
                "--eval_fraction is not possible with --dataset_streaming: set --dataset_test_split instead."
            )
