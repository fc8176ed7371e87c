"""Merge an adapter into the weights of its model, check the result, and save it as a model of its own.

    python -m sdft_ds.merge RUN OUT [--base MODEL] [--dtype DTYPE]

RUN is a folder with an adapter: what a run saved, one of its checkpoints, or another. OUT must not exist yet. It gets
the weights, configuration, tokenizer with chat template, generation config and a model card: all that transformers,
vLLM and converters need. Runs on the CPU; memory is needed for the model once.

The saved model is loaded again and compared with the adapted one, on a greedy answer of the latter. The adapter of a
run on quantized weights is merged into these weights, dequantized, because it was trained to correct them.
"""

import argparse
import gc
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from sdft_ds import model_card
from sdft_ds.checkpoint import storage
from sdft_ds.cli import errors
from sdft_ds.cli.terminal import tidy
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.files import atomic_folder
from sdft_ds.model import export
from sdft_ds.model.completion_forward import causal_lm_of

QUESTION = "Describe the sea in two sentences."
ANSWER_LENGTH = 24
DTYPES = ("auto", "bfloat16", "float16", "float32")
SENTENCEPIECE = "tokenizer.model"
SHARD_SIZE = "5GB"  # also bounds what save_pretrained copies at a time
# Largest relative difference of logits for which a merged model counts as right: at least five times what rounding the
# merged weights made in any model that was tried.
TOLERANCE = {torch.float32: 0.001, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Comparison:
    """The saved model against the adapted one. difference, effect: relative difference of their logits, and of those
    with the adapter on and off; same: positions of the adapted model's greedy answer at which both find the same token
    likeliest, given the same ones before it."""

    difference: float
    effect: float
    same: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"at {self.same} of {ANSWER_LENGTH} positions of an answer the likeliest token is the same; logits differ "
            f"by {self.difference:.2%}, where {TOLERANCE[self.dtype]:.1%} is the limit in {_name(self.dtype)}, and "
            f"the adapter changes them by {self.effect:.2%}"
        )


@dataclass(frozen=True)
class _Answer:
    """A greedy answer of the adapted model. ids_1T: prompt and answer; logits_TV with the adapter on; effect: as in
    Comparison."""

    ids_1T: Tensor
    logits_TV: Tensor
    effect: float

    @classmethod
    def of(cls, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> "_Answer":
        ids_1T = _prompt(tokenizer)
        for _ in range(ANSWER_LENGTH):
            ids_1T = torch.cat([ids_1T, _logits(model, ids_1T)[-1].argmax().view(1, 1)], dim=1)
        logits_TV = _logits(model, ids_1T)
        with model.disable_adapter():
            effect = _difference(_logits(model, ids_1T), logits_TV)
        return cls(ids_1T, logits_TV, effect)

    def compare(self, model: PreTrainedModel) -> Comparison:
        logits_TV = _logits(model, self.ids_1T)
        answer = slice(-ANSWER_LENGTH - 1, -1)
        # Of forward passes of one shape: in bf16 another shape rounds otherwise, and near-ties fall to another token.
        same = int((logits_TV[answer].argmax(1) == self.logits_TV[answer].argmax(1)).sum())
        return Comparison(_difference(logits_TV, self.logits_TV), self.effect, same, model.dtype)


def _prompt(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if tokenizer.chat_template is None:
        return tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    turn = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]


@torch.no_grad()
def _logits(model: nn.Module, ids_1T: Tensor) -> Tensor:
    return model(input_ids=ids_1T, use_cache=False).logits[0].float()


def _difference(logits_TV: Tensor, expected_TV: Tensor) -> float:
    """Relative to the expected logits, the mean of each position left out, which has no effect."""
    centered, expected = (each - each.mean(1, keepdim=True) for each in (logits_TV, expected_TV))
    return float((centered - expected).norm() / expected.norm())


def merge(
    folder: Path, out: Path, base: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> Comparison:
    """Save the model with the adapter in `folder` merged into its weights as `out`. base: where its model is now;
    dtype: of the merged weights, by default the model's own.

    Raises ValueError, naming the folder and the remedy, if there is nothing to merge, if something is in the way, or
    if the saved model does not compute what the adapted one does; then `out` is not written.
    """
    _require_adapter(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose another folder, or delete it.")
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{folder}: {config.peft_type.value} learns tokens before the prompt, not weights to merge.")
    name = base or config.base_model_name_or_path
    code = {"trust_remote_code": trust_remote_code}
    with atomic_folder(out) as aside:
        model = _adapted(folder, _base(folder, config, name, dtype, code))
        processor = _processor(folder, name, code)
        tokenizer = getattr(processor, "tokenizer", processor)
        answer = _Answer.of(model, tokenizer)
        merged = _merged(model)
        _require_space(aside, merged)
        print(f"Saving {_name(merged.dtype)} weights ...", flush=True)
        merged.save_pretrained(aside, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(aside)
        _add_sentencepiece(aside, name)
        del model, merged
        gc.collect()
        compared = answer.compare(AutoModelForCausalLM.from_pretrained(aside, dtype="auto", **code).eval())
        if not compared.difference <= TOLERANCE[compared.dtype]:  # NaN is a failure, too
            raise ValueError(
                f"{folder}: the merged model is not the adapted one, and was not saved: {compared}. Serve the adapter "
                "itself, or merge with --dtype float32."
            )
        card = model_card.render_merged(out.resolve().name, name, config.peft_type.value, str(compared), _card(folder))
        (aside / "README.md").write_text(card, encoding="utf-8")
    return compared


def _require_adapter(folder: Path) -> None:
    """Raises ValueError, naming what is there, if `folder` holds no adapter."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    if (folder / "adapter_config.json").exists():
        return
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no adapter: all weights were trained, and {folder} is the model to serve.")
    found = [each for each in storage.checkpoints(folder) if (each / "adapter_config.json").exists()]
    found += [file.parent for file in sorted(folder.glob("*/adapter_config.json")) if file.parent not in found]
    full = [each for each in storage.checkpoints(folder) if any(each.glob("*.safetensors"))]
    if found:
        raise ValueError(f"{folder} has no adapter, but {found[0]} has one: give that folder.")
    if full:
        raise ValueError(f"{folder} has no adapter: all weights are trained, and the newest model is {full[0]}.")
    raise ValueError(f"{folder} has neither an adapter nor a model: give the output_dir of a run, or a checkpoint.")


def _base(folder: Path, config: PeftConfig, name: str | None, dtype: str, code: dict[str, bool]) -> PreTrainedModel:
    """The model that the adapter was trained on, as it was then: weights that were quantized are so here, and then
    dequantized."""
    if name is None:
        raise ValueError(f"{folder} names no base model: give it as --base.")
    options: dict[str, Any] = {"dtype": dtype, **code}
    if name == config.base_model_name_or_path and config.revision is not None:
        options["revision"] = config.revision
    try:
        own = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        error = "There is no such folder." if Path(name).is_absolute() and not Path(name).exists() else error
        raise ValueError(
            f"The base model of {folder} is {name}, which cannot be loaded: if it has moved, give its place as "
            f"--base. {error}"
        ) from None
    if getattr(own, "quantization_config", None) is None and (quantization := _quantization(folder)) is not None:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
    # On the CPU, also what bitsandbytes would put on a GPU.
    model = AutoModelForCausalLM.from_pretrained(name, device_map="cpu", **options)
    if getattr(model, "is_quantized", False):
        print("The weights were quantized in training: merging into them, dequantized.", flush=True)
        model = model.dequantize()
    return model


def _quantization(folder: Path) -> dict[str, Any] | None:
    """How the run that saved `folder` quantized its weights, as in its run.json."""
    records = [each / "run.json" for each in (folder, folder.absolute().parent)]
    return next((json.loads(file.read_text()).get("quantization") for file in records if file.exists()), None)


def _adapted(folder: Path, base: PreTrainedModel) -> PeftModel:
    """The base model with the adapter, of which all weights must have found their place, and it all its weights."""
    wrong = f"The adapter in {folder} is not one of {base.config.name_or_path}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            model = PeftModel.from_pretrained(base, folder, torch_device="cpu").eval()
        except (RuntimeError, ValueError, UserWarning) as error:
            raise ValueError(f"{wrong}: {error}") from None
    if unused := load_peft_weights(folder, device="cpu").keys() - get_peft_model_state_dict(model).keys():
        raise ValueError(f"{wrong}, which has no {min(unused)}.")
    return model


def _processor(folder: Path, base: str, code: dict[str, bool]) -> Any:
    """The tokenizer, or the processor with it, that was saved with the adapter, else the base model's."""
    own = any(folder.glob("tokenizer*"))
    return AutoProcessor.from_pretrained(folder if own else base, **code)


def _add_sentencepiece(folder: Path, base: str) -> None:
    """Add the base model's tokenizer.model, if it has one: transformers does not save it, and llama.cpp's converter
    needs it."""
    file = cached_file(base, SENTENCEPIECE, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        shutil.copy(file, folder)


def _merged(model: PeftModel) -> PreTrainedModel:
    """The model with the adapter merged, in place. A head that shares the embedding's weights gets its own before:
    else what is added to one would be added to both. They are shared again if they are still equal."""
    lm = causal_lm_of(model)
    head, embedding = (_original(each) for each in (lm.get_output_embeddings(), lm.get_input_embeddings()))
    shared = head.weight is embedding.weight
    if shared and not export.is_tied(model):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        lm = model.merge_and_unload()
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if shared:
        tied = torch.equal(head.weight, embedding.weight)
        if tied:
            head.weight = embedding.weight
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = tied
    return lm


def _original(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _require_space(folder: Path, model: PreTrainedModel) -> None:
    needed = sum(each.numel() * each.element_size() for each in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder.parent}: the model needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")


def _card(folder: Path) -> str | None:
    file = folder / "README.md"
    return file.read_text(encoding="utf-8") if file.exists() else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdft_ds.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="a folder with an adapter")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--base", help="the model that the adapter was trained on, if it is elsewhere now")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the merged weights; auto: the model's own")
    trust = SDFTConfig.__dataclass_fields__["trust_remote_code"].metadata["help"]
    parser.add_argument("--trust_remote_code", action="store_true", help=trust)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Merge as specified on the command line. Whatever is wrong is said in one line, with exit status 1."""
    args = _parser().parse_args(argv)
    try:
        with tidy():
            compared = merge(args.run, args.out, args.base, args.dtype, args.trust_remote_code)
    except Exception as error:
        errors.leave(error)
    print(f"Checked: {compared}.")
    if compared.difference > compared.effect / 4 and compared.dtype != torch.float32:
        print(f"Rounding to {_name(compared.dtype)} lost part of what the adapter learned: see --dtype float32.")
    print(f"The merged model is in {args.out}. To serve it: vllm serve {args.out}")


if __name__ == "__main__":
    main()
