"""A model's greedy answers, without a trainer."""

import itertools
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Model:
    """Greedy answers in fp32, of at most `longest` tokens, to conversations, all in one batch."""

    def __init__(self, folder: str, longest: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        end = self.network.generation_config.eos_token_id
        self.special = {*self.tokenizer.all_special_ids, *(end if isinstance(end, list) else [end])}
        self.longest = longest

    @torch.no_grad()
    def answers(
        self, prompts: list[list[dict[str, str]]], begun: Sequence[list[int]] | None = None
    ) -> list[list[int]]:
        """The tokens of each answer up to a special one. begun: the tokens that each is to begin with."""
        begun = begun or [[]] * len(prompts)
        rows = self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True).input_ids
        rows = [ids + start for ids, start in zip(rows, begun, strict=True)]
        inputs = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
        ids = self.network.generate(**inputs, do_sample=False, max_new_tokens=self.longest)
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        kept = [list(itertools.takewhile(lambda token: token not in self.special, row)) for row in new]
        return [start + rest for start, rest in zip(begun, kept, strict=True)]

    def texts(self, answers: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(answers)
