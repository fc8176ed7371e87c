"""Whatever a data set, a template, a YAML file or a checkpoint's manifest holds: it is used, or refused by a message
of ours, and soon. --full tries many more inputs of each kind, and says how many.
"""

import json
import time
import warnings

import datasets
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdft_ds.checkpoint import storage
from sdft_ds.cli import yaml_config
from sdft_ds.cli.arguments import parse
from sdft_ds.cli.dataset_loading import load
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.prompts import PromptBuilder, PromptTooLong, parse_template
from sdft_ds.data.rows import RowError, example_from_row
from sdft_ds.data.validation import BadRows, validate_dataset

SECONDS = 20  # for one input, on a machine that does other things besides


@pytest.fixture(params=[1, pytest.param(50, marks=pytest.mark.full)], ids=["short", "long"])
def trial(request, capsys):
    """Tries a check on `count` inputs of a strategy; 50 times as many with --full."""

    def run(strategy, check, count):
        tried = 0

        @settings(max_examples=count * request.param, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(strategy)
        def one(value):
            nonlocal tried
            tried += 1
            start = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(value)
            assert time.monotonic() - start < SECONDS

        one()
        if request.param > 1:
            with capsys.disabled():
                print(f"\n{request.node.name}: {tried} inputs tried")

    return run


def mostly(usual, other):
    """Three times out of four the usual."""
    return st.one_of(usual, usual, usual, other)


# ---- rows -----------------------------------------------------------------------------------------------------------

MARKS = ["{", "}", "{{", "}}", "{prompt}", "{privileged_context}", "$x", "${y}", "$$", "{{ jinja }}", "{% raw %}",
         "\0", "\ud800", "<|im_end|>", "\n", "日本", "🤖", "%s", "\\"]  # fmt: skip
marked = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(MARKS)), max_size=5).map("".join)
plain = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), marked),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(marked, inner, max_size=3)),
    max_leaves=6,
)
content = st.one_of(
    marked, st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": marked}), max_size=2)
)
role = mostly(st.sampled_from(["system", "user", "assistant", "tool"]), anything)
message = st.fixed_dictionaries(
    {"role": role, "content": mostly(content, anything)}, optional={"tool_calls": anything, "name": anything}
)
prompt = mostly(st.one_of(marked, st.lists(message, max_size=3)), anything)
tools = mostly(st.lists(st.dictionaries(marked, anything, max_size=2), max_size=2), st.one_of(anything, marked))
row = st.fixed_dictionaries(
    {"prompt": prompt, "privileged_context": mostly(st.one_of(prompt, st.lists(marked, max_size=3)), anything)},
    optional={"teacher_prompt": prompt, "tools": tools},
)


def test_rows(trial, tokenizer):
    def check(row):
        try:
            example = example_from_row(row, 3)
            pair = builder.build(example, 3)
        except (RowError, PromptTooLong) as error:
            assert str(error).startswith("Row 3")
            return
        assert len(pair.student.ids) <= 60 and len(pair.teacher.ids) <= 90
        for part in (pair.student.text, pair.teacher.text):
            assert part.encode() and "\0" not in part

    builder = PromptBuilder(tokenizer, "{prompt}\n\n{privileged_context}", 60, 90)
    trial(row, check, 200)


conversation = st.tuples(plain, plain).map(
    lambda texts: [{"role": "system", "content": texts[0]}, {"role": "user", "content": texts[1]}]
)
usable = st.fixed_dictionaries(
    {"prompt": st.one_of(plain, conversation), "privileged_context": plain}, optional={"teacher_prompt": plain}
)


def test_values_are_verbatim(trial, tokenizer):
    def check(row):
        try:
            pair = builder.build(example_from_row(row, 0), 0)
        except RowError:  # of white space only
            assert not all(text.strip() for text in texts_of(row))
            return
        question = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        inside = row.get("teacher_prompt") or f"<{question}>{{$x}}{question}|{row['privileged_context']}"
        assert inside in pair.teacher.text and question in pair.student.text
        assert tokenizer.decode(pair.teacher.ids) == pair.teacher.text

    def texts_of(row):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        return [prompt, row["privileged_context"], row.get("teacher_prompt", "x")]

    builder = PromptBuilder(tokenizer, "<{prompt}>{{$x}}{prompt}|{privileged_context}", None, None)
    trial(usable, check, 100)


def test_files_of_rows(trial, tokenizer, tmp_path, monkeypatch):
    """JSON Lines as they may come, and broken ones, read as the command line reads them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.jsonl"
    args = ScriptArguments(dataset_path=[str(file)])
    builder = PromptBuilder(tokenizer, "{prompt} {privileged_context}", 60, 90)

    def check(data):
        file.write_bytes(data)
        try:
            train, _ = load(args, False, 0)
            validate_dataset(train, "train_dataset", builder, BadRows("skip"))
        except ValueError as error:
            assert "rows.jsonl" in str(error) or "train_dataset" in str(error)

    lines = (
        st.lists(mostly(usable, st.one_of(row, anything)).map(json.dumps), min_size=1, max_size=4)
        .map("\n".join)
        .map(str.encode)
    )
    broken = st.tuples(lines, st.integers(0, 200), st.binary(max_size=3)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]
    )
    trial(mostly(lines, st.one_of(broken, st.binary(max_size=40))), check, 15)


# ---- templates ------------------------------------------------------------------------------------------------------

PIECES = ["{prompt}", "{privileged_context}", "{{", "}}", "{", "}", "{0}", "{prompt.a}", "{prompt!r}", "{prompt:>9}",
          "{prompt[0]}", "{}", "$prompt", "{{ x }}", "{ prompt }"]  # fmt: skip
VALUES = {"prompt": "{privileged_context}{{", "privileged_context": "{prompt}}}$x"}


def reference(template):
    """The filled template, read one mark after the other; None for one that is not allowed."""
    filled, used, at = "", set(), 0
    while at < len(template):
        rest = template[at:]
        name = next((name for name in VALUES if rest.startswith("{" + name + "}")), None)
        if rest[:2] in ("{{", "}}"):
            filled, at = filled + rest[0], at + 2
        elif name:
            filled, at = filled + VALUES[name], at + len(name) + 2
            used.add(name)
        elif rest[0] in "{}":
            return None
        else:
            filled, at = filled + rest[0], at + 1
    return filled if used == set(VALUES) else None


def test_templates(trial):
    def check(template):
        expected = reference(template)
        try:
            pieces = parse_template(template)
        except ValueError as error:
            assert expected is None and str(error).startswith("teacher_prompt_template")
            return
        assert "".join(literal + VALUES.get(name, "") for literal, name in pieces) == expected

    piece = st.one_of(st.sampled_from(PIECES[:4]), st.text(max_size=4))
    allowed = st.lists(piece, max_size=6).map(lambda some: [*PIECES[:2], *some]).flatmap(st.permutations)
    anyhow = st.lists(st.one_of(st.sampled_from(PIECES), piece), max_size=8)
    trial(st.one_of(allowed, anyhow).map("".join), check, 300)


# ---- YAML -----------------------------------------------------------------------------------------------------------


def test_yaml_text(trial, tmp_path):
    file = tmp_path / "run.yaml"

    def check(data):
        file.write_bytes(data)
        try:
            assert isinstance(yaml_config.read(str(file)), dict)
        except ValueError as error:
            assert "run.yaml" in str(error) and "\n" not in str(error)

    words = [
        "a: ",
        "- ",
        "&a ",
        "*a",
        "<<: ",
        "[",
        "]",
        "{",
        "}",
        "!!python/object/apply:os.getcwd",
        "\n",
        "  ",
        "? ",
        "|",
        ">",
        "'",
        '"',
        "#",
        "---",
        "...",
        "%YAML 9.9",
        "!!binary ",
        "2024-13-45",
        ".nan",
        "0o9",
        "\t",
        "1e5",
    ]
    text = st.lists(st.one_of(st.sampled_from(words), st.text(max_size=4)), max_size=12).map("".join).map(
        lambda text: text.encode(errors="surrogatepass")
    )  # fmt: skip
    proper = st.dictionaries(marked, anything, max_size=3).map(
        lambda each: yaml.dump(each, allow_unicode=True).encode()
    )
    broken = st.tuples(proper, text, st.integers(0, 60)).map(lambda p: p[0][: p[2]] + p[1] + p[0][p[2] :])
    trial(st.one_of(proper, broken, text, st.binary(max_size=30)), check, 300)


SETTINGS = {
    f.name: f.default for kind in (ScriptArguments, ModelArguments) for f in kind.__dataclass_fields__.values()
} | {name: SDFTConfig.__dataclass_fields__[name].default for name in SDFTConfig.__annotations__ if name[0] != "_"}
SETTINGS |= {"max_steps": 5, "seed": 3, "save_strategy": "no", "run_name": "a", "per_device_train_batch_size": 8}


def test_yaml_settings(trial, tmp_path):
    file = tmp_path / "run.yaml"

    def check(given_settings):
        file.write_text(yaml.safe_dump(given_settings))
        try:
            parse(["--config", str(file)], {})
        except SystemExit as ended:
            assert ended.code == 2
        except ValueError as error:
            assert any(name in str(error) for name in SETTINGS), str(error)

    value = st.one_of(
        anything, st.sampled_from(["no", "none", "1", "true", "{prompt} {privileged_context}", [], ["a"], {"a": 1}])
    )
    value = value.map(lambda each: json.loads(json.dumps(each)))
    names = mostly(st.sampled_from(list(SETTINGS)), st.text(max_size=5))
    pairs = names.flatmap(lambda name: st.tuples(st.just(name), mostly(st.just(SETTINGS.get(name)), value)))
    trial(st.lists(pairs, min_size=1, max_size=4).map(dict), check, 30)


# ---- manifests ------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(tmp_path):
    with storage.writing(str(tmp_path), 7) as folder:
        for name in ("model.safetensors", "state.json"):
            with open(f"{folder}/{name}", "w") as file:
                file.write(name * 3)
    return tmp_path / "checkpoint-7"


entry = mostly(
    st.fixed_dictionaries({"size": mostly(st.just(51), anything), "sha256": mostly(marked, anything)}), anything
)
names = mostly(st.sampled_from(["model.safetensors", "state.json", "..", ".", "/", "x" * 300]), marked)
manifest = mostly(
    st.fixed_dictionaries({"files": mostly(st.dictionaries(names, entry, max_size=3), anything)}), anything
).map(lambda value: json.dumps(value).encode())  # fmt: skip


def test_manifests(trial, complete):
    def check(data):
        (complete / storage.MANIFEST).write_bytes(data)
        assert storage.problem(complete) is not None
        assert storage.newest_complete(complete.parent)[0] is None

    trial(st.one_of(manifest, st.binary(max_size=40), st.just(b"[" * 100_000)), check, 200)


def test_a_changed_byte_is_never_taken_for_the_checkpoint(trial, complete):
    """Of the manifest: what it lists is still so, or it is refused. Of a listed file: refused."""
    kept = {path: path.read_bytes() for path in complete.iterdir()}

    def check(change):
        name, at, bits = change
        path = complete / name
        data = bytearray(kept[path])
        data[at % len(data)] ^= bits
        path.write_bytes(data)
        wrong = storage.problem(complete)
        path.write_bytes(kept[path])
        if name == storage.MANIFEST and wrong is None:
            assert json.loads(data)["files"] == json.loads(kept[path])["files"]
        else:
            assert wrong is not None and (name == storage.MANIFEST or name in wrong)
        assert storage.problem(complete) is None

    where = st.sampled_from([storage.MANIFEST, "model.safetensors", "state.json"])
    trial(st.tuples(where, st.integers(0, 1000), st.integers(1, 255)), check, 100)
