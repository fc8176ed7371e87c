"""Model card: renders facts about a run as Markdown with hub metadata."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sdft_ds.config.fields import is_read_by, own_fields
from sdft_ds.config.inherited import ON_THE_CARD
from sdft_ds.config.sdft_config import SDFTConfig

CITATION = """\
```bibtex
@misc{sdft,
    title = {Self-Distillation Enables Continual Learning},
    year = {2026},
    eprint = {2601.19897},
    archivePrefix = {arXiv},
}
```"""
CITATIONS = {
    "sdft": CITATION,
    "sdpo": """\
```bibtex
@misc{sdpo,
    title = {Reinforcement Learning via Self-Distillation},
    year = {2026},
    eprint = {2601.20802},
    archivePrefix = {arXiv},
}
```""",
}
# Logged metric -> its label.
LOSSES = {
    "sdft/distillation_loss": "distance from the teacher, nats/token",
    "loss": "loss",
    "rewards/mean": "reward",
}
EVALUATED = re.compile(r"eval_((?P<rows>[^/]+)_)?loss")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
TRAINED_ADAPTER = "- Trained: an adapter"
FIGURES = {"accuracy": "accuracy", "kl_to_start": "KL from the start, nats/token"}


@dataclass(frozen=True)
class Source:
    """A model or a data set: its hub id, or another name; of a local path only the last component."""

    name: str
    on_hub: bool

    @classmethod
    def of(cls, name: str) -> "Source":
        path = Path(name)
        if path.exists():
            return cls(path.resolve().name, False)
        return cls(name, True) if HUB_ID.fullmatch(name) else cls(path.name, False)

    def link(self, kind: str = "") -> str:
        return f"[{self.name}](https://huggingface.co/{kind}{self.name})" if self.on_hub else f"`{self.name}`"


@dataclass(frozen=True)
class Facts:
    """Contents of a model card. method: a sentence about it; log: the Trainer's log history; rows: of the data set,
    None for a stream; finetuned_from, dataset: hub ids or local paths, of which only the last component is shown."""

    model_name: str
    method: str
    args: SDFTConfig
    log: Sequence[dict[str, Any]]
    steps: int
    rows: int | None
    adapter: bool
    finetuned_from: str | None = None
    dataset: str | None = None
    recipe: str | None = None
    tags: Sequence[str] = ()
    license: str | None = None
    language: str | None = None


def render(facts: Facts) -> str:
    """The card's text."""
    args = facts.args
    base, data = (name and Source.of(name) for name in (facts.finetuned_from, facts.dataset))
    metadata = ModelCardData(
        base_model=base.name if base and base.on_hub else None,
        datasets=data.name if data and data.on_hub else None,
        language=facts.language,
        library_name="peft" if facts.adapter else "transformers",
        license=facts.license,
        model_name=facts.model_name,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([args.method, "sdft_ds", *facts.tags])),
    )
    rows_of_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    about = {
        "Started from": base and base.link(),
        "Trained": "an adapter" if facts.adapter else "all weights",
        "Recipe": facts.recipe and f"`{facts.recipe}`",
        "Data": data and data.link("datasets/") + (f", {facts.rows} rows" if facts.rows else ""),
        "Steps": f"{facts.steps}, of {rows_of_step} rows each",
    }
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {facts.model_name}",
        facts.method,
        "\n".join(f"- {name}: {value}" for name, value in about.items() if value),
        "## Results",
        _table(("", "first", "last"), _results(facts.log)),
        "## Settings",
        _table(("setting", "value"), [(f"`{name}`", _code(getattr(args, name))) for name in _names(args)]),
    ]
    if args.method in CITATIONS:
        parts += ["## Citation", CITATIONS[args.method]]
    return "\n\n".join(parts) + "\n"


def render_merged(model_name: str, base: str, method: str, check: str, adapter_card: str | None) -> str:
    """The card of a model that an adapter was merged into. method: PEFT's name of it; check: how the result was
    compared; adapter_card: the adapter's, which is kept if it is one of a run."""
    source = Source.of(base)
    about = [f"- Started from: {source.link()}", f"- Trained: an adapter ({method}), merged into the weights"]
    merged = f"Compared with the model that has the adapter on: {check}."
    card = ModelCard(adapter_card, ignore_metadata_errors=True) if adapter_card else None
    if card is None or "sdft_ds" not in (card.data.tags or []):
        data = ModelCardData(
            base_model=source.name if source.on_hub else None, pipeline_tag="text-generation", tags=["sdft_ds"]
        )
        text = "\n\n".join([f"# {model_name}", "\n".join(about), "## Merging", merged])
    else:
        data = card.data
        body = re.sub(r"^# .*", lambda _: f"# {model_name}", card.text.strip(), count=1)
        text = f"{body.replace(TRAINED_ADAPTER, about[1])}\n\n## Merging\n\n{merged}"
    data.library_name, data.model_name = "transformers", model_name
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def _names(args: SDFTConfig) -> list[str]:
    """The settings shown on the card: those that affect what is learned."""
    declared = [
        f.name
        for f in own_fields(type(args))
        if f.metadata.get("card") in (True, args.teacher_model_kind) and is_read_by(args.method, f)
    ]
    return [*ON_THE_CARD, *declared]


def _results(log: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """First and last value of each metric shown on the card."""
    names = dict(LOSSES)
    for name in dict.fromkeys(name for line in log for name in line):
        if evaluated := EVALUATED.fullmatch(name):
            names[name] = f"loss on the evaluation rows{f' {rows}' if (rows := evaluated['rows']) else ''}"
        task, _, figure = name.removeprefix("tasks/").rpartition("/")
        if name.startswith("tasks/") and figure in FIGURES:
            names[name] = f"{task}: {FIGURES[figure]}"
    found = {label: [line[name] for line in log if name in line] for name, label in names.items()}
    return [(label, f"{values[0]:.4g}", f"{values[-1]:.4g}") for label, values in found.items() if values]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else "Nothing was logged."


def _code(value: Any) -> str:
    """A value as code in a table cell: one line; bars and backticks in it end neither the cell nor the code."""
    text = str(getattr(value, "value", value)).replace("\n", "\\n").replace("|", "\\|")
    return f"`` {text} ``"
