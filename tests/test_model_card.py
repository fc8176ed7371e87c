import pickle
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from sdft_ds import SDFTConfig, SFTConfig
from sdft_ds.model_card import Facts, render
from sdft_ds.trainer import TRAINERS
from tests.cli.test_train import PLAIN, TWO_STEPS, command, model_and_data  # noqa: F401
from tests.helpers.hub import Hub
from tests.helpers.trainers import make_trainer

TOKEN = "hf_thisIsAToken123"
LOG = [
    {"step": 0, "tasks/new/accuracy": 0.0, "tasks/new/mean_length": 4.0, "tasks/retention/kl_to_start": 0.0},
    {"step": 1, "loss": 0.5, "sdft/distillation_loss": 0.25},
    {"step": 2, "loss": 0.125, "sdft/distillation_loss": 0.0625},
    {"step": 2, "tasks/new/accuracy": 0.75, "tasks/retention/kl_to_start": 0.0123},
]


def facts(args=None, **changes):
    args = args or SDFTConfig(teacher_model_kind="ema", teacher_update_rate=0.01, teacher_sync_steps=1)
    method = TRAINERS[args.method].objective_class.description
    sources = {"finetuned_from": "org/base", "dataset": "org/rows", "method": method}
    return Facts(**{"model_name": "mine", "args": args, "log": LOG, "steps": 2, "adapter": False, "rows": 7, **sources,
                    **changes})  # fmt: skip


def test_metadata():
    data = ModelCard(render(facts(tags=["sdft", "mine"], license="mit", language="en"))).data
    assert (data.base_model, data.datasets, data.library_name) == ("org/base", "org/rows", "transformers")
    assert (data.tags, data.license, data.language) == (["sdft", "sdft_ds", "mine"], "mit", "en")
    assert ModelCard(render(facts(adapter=True))).data.library_name == "peft"


def test_method_recipe_data_results_settings_and_citation():
    text = render(facts(recipe="paper"))
    assert "Self-distilled fine-tuning" in text and "Recipe: `paper`" in text and "eprint = {2601.19897}" in text
    assert "Data: [org/rows](https://huggingface.co/datasets/org/rows), 7 rows" in text
    assert (
        "| new: accuracy | 0 | 0.75 |" in text and "| retention: KL from the start, nats/token | 0 | 0.0123 |" in text
    )
    named = [{"step": 2, "eval_loss": 2.0, "eval_new_a_loss": 3.0, "eval_sdft/distillation_loss": 4.0}]
    assert "| loss on the evaluation rows | 2 | 2 |\n| loss on the evaluation rows new_a | 3 | 3 |\n\n" in render(
        facts(log=named)
    )
    assert "| distance from the teacher, nats/token | 0.25 | 0.0625 |" in text and "mean_length" not in text
    assert "| `teacher_update_rate` | `` 0.01 `` |" in text and "| `lr_scheduler_type` | `` linear `` |" in text
    assert "teacher_update_rate" not in render(facts(SDFTConfig()))


def test_supervised_fine_tuning_says_nothing_of_a_teacher():
    text = render(facts(SFTConfig()))
    assert "Supervised fine-tuning" in text and "teacher_model_kind" not in text and "bibtex" not in text


def test_what_lies_on_a_disk_is_told_by_name_alone(tmp_path):
    (tmp_path / "secret" / "rows").mkdir(parents=True)
    source = str(tmp_path / "secret" / "rows")
    text = render(facts(finetuned_from=source, dataset=source))
    assert "Data: `rows`, 7 rows" in text and "secret" not in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in metadata and "datasets" not in metadata


@pytest.mark.parametrize("name, said", [
    ("in memory", "`in memory`"), ("/home/me/secret/a.jsonl and 2 more", "`a.jsonl and 2 more`"), ("runs/a/b", "`b`"),
])  # fmt: skip
def test_what_is_no_id_of_the_hub_is_not_linked_to_it(name, said):
    text = render(facts(finetuned_from=name, dataset=name))
    assert f"Data: {said}, 7 rows" in text and f"Started from: {said}" in text and "secret" not in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in metadata and "datasets" not in metadata


def test_text_of_a_setting_stays_in_its_cell():
    text = render(facts(SDFTConfig(teacher_prompt_template="{prompt}\n| `a` |\n{privileged_context}")))
    (line,) = [line for line in text.splitlines() if "teacher_prompt_template" in line]
    assert line == r"| `teacher_prompt_template` | `` {prompt}\n\| `a` \|\n{privileged_context} `` |"


def test_a_stream_and_no_log():
    text = render(facts(rows=None, dataset=None, finetuned_from="", log=[]))
    assert "Data" not in text and "Started from" not in text and "Nothing was logged." in text


def test_the_trainer_writes_it(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "mine"), lora=True, max_steps=1)
    trainer.train()
    trainer.save_model()  # PEFT leaves a card of its own
    trainer.create_model_card(dataset="org/rows", recipe="trl", license="mit")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.model_name == "mine" and card.data.library_name == "peft" and card.data.license == "mit"
    assert "[org/rows]" in card.text and "6 rows" in card.text and "1, of 2 rows each" in card.text
    trainer.create_model_card(model_name="named", dataset_name="org/others", tags="mine")  # TRL's arguments
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.model_name == "named" and "[org/others]" in card.text and "mine" in card.data.tags


def test_a_pickled_configuration_has_no_token():
    args = SDFTConfig(hub_token=TOKEN)
    assert pickle.loads(pickle.dumps(args)).hub_token is None and args.hub_token == TOKEN


@pytest.mark.parametrize("strategy", [pytest.param("end", marks=pytest.mark.full), "checkpoint"])
def test_push_to_hub_sends_the_token_and_writes_it_nowhere(model_and_data, tmp_path, monkeypatch, strategy):  # noqa: F811
    with Hub("org/mine") as hub:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        push = ["--push_to_hub", "--hub_model_id", "org/mine", "--hub_token", TOKEN, "--hub_strategy", strategy]
        command(*PLAIN, *model_and_data, *TWO_STEPS, *push, "--save_strategy", "steps", "--save_steps", "1",
                "--recipe", "trl", "--output_dir", tmp_path / "run")  # fmt: skip
    assert {authorization for _, authorization in hub.calls} == {f"Bearer {TOKEN}"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= hub.files.keys()
    assert hub.files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.model_name == "mine" and "Recipe: `trl`" in card.text and "`train.jsonl`, 6 rows" in card.text
    assert (strategy == "checkpoint") == any(name.startswith("last-checkpoint/") for name in hub.files)
    uploaded = {name for name in hub.files if not name.startswith("last-checkpoint/")}
    assert {"run.json", "metrics.jsonl", "completions", "report.html"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert uploaded == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "training_args.bin", "README.md",
    }  # fmt: skip
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not any(TOKEN.encode() in content for content in [*written, *hub.files.values()])
    assert not any(str(tmp_path).encode() in hub.files[name] for name in ("README.md", "config.json"))


@pytest.mark.parametrize("asked", [False, True])
def test_files_of_a_run_are_uploaded_when_asked_for_only(tmp_path, monkeypatch, asked):
    """Of a folder with everything in it, from Python, with an adapter, at a checkpoint and at the end."""
    model = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "teacher/config.json", "README.md"}
    run = {"report.html", "completions/step-1.parquet", "evaluations/a/tokenizer.json", "lessons.json", "script.py"}
    commits = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: commits.append(options) or Done())
    output = tmp_path / "run"
    trainer = make_trainer(output_dir=str(output), lora=True, max_steps=1, hub_upload_run_files=asked)
    trainer.hub_model_id, trainer.push_in_progress = "org/mine", None
    for name in run | {"teacher/config.json", "checkpoint-1/adapter_config.json", "checkpoint-1/tokenizer.json"}:
        Path(output, name).parent.mkdir(parents=True, exist_ok=True)
        Path(output, name).write_text(name)
    trainer._push_from_checkpoint(str(output / "checkpoint-1"))
    assert Path(output, "adapter_config.json").read_text() == "checkpoint-1/adapter_config.json"
    trainer.push_to_hub(dataset="org/rows")
    first, last = (uploaded(commit) for commit in commits)
    assert {"adapter_config.json", "tokenizer.json", "teacher/config.json"} <= first and model <= last
    assert (run <= first & last) if asked else not run & (first | last)
    assert not any(name.startswith("checkpoint-") for name in first | last)


class Done:
    def done(self):
        return True


def uploaded(commit):
    """The files that `upload_folder` takes; where a commit says nothing of it, all."""
    folder = Path(commit["folder_path"])
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    patterns = {name: commit.get(name) for name in ("allow_patterns", "ignore_patterns")}
    return set(filter_repo_objects(names, **patterns))
