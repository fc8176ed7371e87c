"""Files as they come: compressed, in other encodings, with other delimiters, broken."""

import gzip
import json

import pytest
from huggingface_hub import constants

from sdft_ds import read_dataset
from sdft_ds.cli.dataset_loading import load
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.data.loading import csv_files

ROWS = [{"prompt": "Où?", "completion": "Là; à côté, « ici »\nou là."}, {"prompt": "007", "completion": "NA"}]


def read(path, content, **named):
    path.write_bytes(content)
    return [
        {"prompt": row["prompt"], "completion": row["golden_response"]}
        for row in read_dataset(path, prompt_as="text", **named)
    ]


def table(delimiter, end="\n"):
    cells = [[name for name in ROWS[0]], *(row.values() for row in ROWS)]
    return end.join(delimiter.join(f'"{cell}"' for cell in row) for row in cells) + end


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", table(",").encode(), None),
        ("a.csv", table(",", "\r\n").encode("utf-8-sig"), None),
        ("a.csv", table(";").encode(), "is read with delimiter ';'."),
        ("a.csv", table("|").encode(), "delimiter '|'"),
        ("a.csv", table("^").encode(), "delimiter '^'"),
        ("a.csv", table("\t").encode(), None),
        ("a.tsv", table("\t").encode(), None),
        ("a.csv", table(", ").encode(), None),
        ("a.csv", table(";").encode("cp1252"), "delimiter ';' and encoding cp1252 (a guess: save the file as UTF-8"),
        ("a.csv", table(",").encode("utf-16"), "encoding utf-16."),
        ("a.csv", table(",").encode("utf-16-le"), "encoding utf-16-le (a guess"),
        ("a.csv", table(",").encode("utf-16-be"), "encoding utf-16-be (a guess"),
        ("a.csv", table(",").encode("utf-32"), "encoding utf-32."),
        ("a.csv.gz", gzip.compress(table(";").encode(), mtime=0), "delimiter ';'"),
        ("a.TSV.GZ", gzip.compress(table("\t").encode(), mtime=0), None),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0), None),
        ("a.json.gz", gzip.compress(json.dumps({"data": ROWS}).encode(), mtime=0), None),
        ("a.json", json.dumps({"data": ROWS}).encode(), None),
        ("a.json", json.dumps({"version": 1, "rows": ROWS}, indent=2).encode("utf-8-sig"), None),
        ("a.jsonl", json.dumps({"data": ROWS}).encode(), None),
        ("a.json", json.dumps(ROWS, indent=2).encode(), None),
    ],
)
def test_rows_are_read_as_text_whatever_the_file(tmp_path, capsys, name, content, said, streaming):
    assert read(tmp_path / name, content, streaming=streaming) == ROWS
    out = capsys.readouterr().out
    assert out.count("is read with") == (said is not None) and (said or "") in out


def test_a_row_is_no_list_of_rows(tmp_path):
    """A file of one row may hold a list of objects as well."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": turns}))
    (tmp_path / "b.json").write_text(json.dumps({"q": "Why?", "completion": "So.", "tools": [{"name": "f"}]}))
    assert read_dataset(tmp_path / "a.json")[0]["privileged_context"] == "Example response: So."
    row = read_dataset(tmp_path / "b.json", prompt_column="q")[0]
    assert row["tools"] == [{"name": "f"}] and row["privileged_context"] == "Example response: So."


def test_letters_of_other_languages():
    texts = {
        "cp1251": "Как тебя зовут? Меня зовут Мира. Где ты живёшь? В Лиссабоне.",
        "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
        "cp1252": "Onde você mora? Não sei onde está a irmã do João.",
        "shift_jis": "名前は何ですか。どこに住んでいますか。",
        "gb18030": "你叫什么名字？你住在哪里？我住在里斯本。",
    }
    for encoding, text in texts.items():
        found = csv_files._legacy_encoding(b"ascii\n" + text.encode(encoding))
        assert text.encode(encoding).decode(found) == text, (encoding, found)
    assert csv_files._legacy_encoding("£5".encode("cp1252")) == "cp1252"


def test_an_empty_cell_has_no_context(tmp_path):
    """Whether it is the row's own context, where the demonstration counts, the demonstration, or the own prompt of the
    teacher."""
    (tmp_path / "a.csv").write_text("prompt,privileged_context,golden_response,teacher_prompt\na,,b,\nc,d,,\n")
    rows = read_dataset(tmp_path / "a.csv")
    assert rows["teacher_prompt"] == [None, None]
    assert rows["privileged_context"] == ["Example response: b", "d"] and rows["golden_response"] == ["b", None]


FIVE = b'{"prompt": "a", "completion": "b"}\n' * 5


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", FIVE + b'{"prompt": "a", "comp\n' + FIVE, "line 6, column 17: Unterminated string"),
        ("a.jsonl", FIVE + b'\n\n{"prompt": "a"} x\n', "line 8, column 17: Extra data"),
        ("a.jsonl", FIVE + b'["a", "b"]\n', r"""line 6: found '\["a", "b"\]'; expected an object"""),
        ("a.json", FIVE + b'{"prompt": \n', "line 6, column 11: Expecting value"),
        ("a.json", b'{"data": [\n{"prompt": "a"},\n{"prompt" "a"}\n]}', "line 3, column 11: Expecting ':'"),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "a"}\n]', "line 3, column 11: Expecting ':'"),
        ("a.jsonl", FIVE + '{"prompt": "é"}'.encode("cp1252"), "line 6: not UTF-8 .*: save it as UTF-8"),
        ("a.jsonl", '{"prompt": "é"}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.jsonl.gz", gzip.compress(FIVE + b"{", mtime=0), "line 6, column 2"),
        (
            "a.json",
            b'{"train": [{"a": 1}], "test": [{"a": 1}]}',
            "several lists, train, test: make each",
        ),
        ("a.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n', "line 4: 3 fields, where the header has 2"),
        ("a.csv", b"prompt,completion\n" + b"a,b\n" * 20000 + b"a,b,c\n", "line 20002: 3 fields, where the header"),
        ("a.csv", b'prompt,completion\na,"b\nc,d\n', "line 2: a quotation mark is opened and never closed"),
        ("a.csv", b'prompt,completion\na,"b\nc,"d"\ne,f\n', "line 2: a quotation mark is missing"),
        ("a.csv", b"prompt,answer,prompt\na,b,c\n", "two columns of the name 'prompt'"),
        ("a.csv.gz", b"prompt,completion\na,b\n", "Not a gzipped file"),
        ("a.csv", b"prompt,completion\n", "has a header, but no rows"),
    ],
)
def test_a_broken_file_is_told_with_its_line_as_an_editor_counts_it(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=rf"{name}.*{words}") as error:
        read(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_files_of_different_dialects(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "b.csv").write_text("prompt;completion\na;b\n")
    with pytest.raises(ValueError, match="one header, delimiter and encoding are needed: .*a.csv.*','; .*b.csv.*';'"):
        read_dataset(tmp_path)


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="dataset_name org/set: http://127.0.0.1:9 cannot be reached.*HF_HUB_OFFLINE"):
        load(ScriptArguments(dataset_name="org/set"), False, 0)
