"""Labelled text from files, and its split."""

import gzip
import json
import zipfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from crosslm.config import Config, DataConfig
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.data.split import balanced_sample, dirichlet_split, load_split
from crosslm.data.split import test_rows as rows_to_test
from crosslm.data.texts import load_examples, readable_lines
from crosslm.errors import DataError
from crosslm.evaluate import nlu_rows
from crosslm.runs.preparation import public_texts

LABELS = ("bad", "good")
ROWS = [("a good day", "good"), ('said "bad", twice', "bad"), ("über", "good")]


@pytest.fixture
def data(tmp_path):
    return DataConfig(dir=str(tmp_path), test="x")


def as_csv(rows):
    return "text,label\n" + "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in rows)


def as_jsonl(rows):
    return "".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows)


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.jsonl", "x.jsonl.gz", "X.CSV", "x.Jsonl.GZ"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, data, name):
    text = as_csv(ROWS) if ".csv" in name.lower() else as_jsonl(ROWS)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    loaded = load_examples(name, data, LABELS)
    assert loaded.examples == Examples([text for text, _ in ROWS], [1, 0, 1])
    assert not loaded.warnings()


def test_a_name_also_finds_its_gz(tmp_path, data):
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(as_csv(ROWS).encode()))
    assert len(load_examples("x.csv", data, LABELS).examples) == 3


def test_a_byte_order_mark_and_other_columns_do_no_harm(tmp_path):
    (tmp_path / "x.csv").write_text("id,note,sentiment\n1,fine,good\n", encoding="utf-8-sig")
    data = DataConfig(dir=str(tmp_path), test="x", text_column="note", label_column="sentiment")
    assert load_examples("x.csv", data, LABELS).examples == Examples(["fine"], [1])


def test_rows_without_text_or_not_utf8_are_left_out_counted_and_named(tmp_path, data):
    lines = [b"text,label", b"fine,good", b",good", b"caf\xe9,bad", b'"  ",bad', b"poor,bad"]
    (tmp_path / "x.csv").write_bytes(b"\n".join(lines) + b"\n")
    loaded = load_examples("x.csv", data, LABELS)
    assert loaded.examples == Examples(["fine", "poor"], [1, 0])
    empty, broken = loaded.warnings()
    assert empty.endswith("x.csv: 2 rows (2, 4) left out: no text")
    windows = 'or if it is of Windows say data.encoding = "cp1252"'
    assert broken.endswith(f"x.csv: 1 row (3) left out: not UTF-8; save the file as UTF-8, {windows}")


def test_blank_lines_above_the_names_of_columns_do_no_harm(tmp_path, data):
    (tmp_path / "x.csv").write_text("\n  \n,\ntext,label\nfine,good\n\npoor,bad\n")
    assert load_examples("x.csv", data, LABELS).examples == Examples(["fine", "poor"], [1, 0])


def test_a_text_that_is_no_string_is_told_as_such(tmp_path, data):
    lines = [{"text": 42, "label": "good"}, {"text": None, "label": "bad"}, {"text": "fine", "label": "good"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load_examples("x.jsonl", data, LABELS)
    assert loaded.examples == Examples(["fine"], [1])
    empty, number = loaded.warnings()
    assert empty.endswith("x.jsonl: 1 row (2) left out: no text")
    assert number.endswith("x.jsonl: 1 row (1) left out: the text is no string; write it in quotes")


def test_a_file_of_another_encoding_is_named_as_such(tmp_path, data):
    (tmp_path / "x.csv").write_bytes("text,label\ncafé,bad\nüber,good\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.csv: 2 rows \(1, 2\) left out: not UTF-8; save the .*; no row is left"):
        load_examples("x.csv", data, LABELS)
    utf16 = "text,label\ncafé,bad\n".encode("utf-16")
    for name, content in (("x.csv", utf16), ("y.csv.gz", gzip.compress(utf16))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: is UTF-16 and must be UTF-8"):
            load_examples(name, data, LABELS)
    with zipfile.ZipFile(tmp_path / "z.csv", "w") as book:  # as a spreadsheet keeps its own, under another name
        book.writestr("xl/workbook.xml", "")
    with pytest.raises(DataError, match=r"z\.csv: is a spreadsheet's own file .* save as CSV UTF-8"):
        load_examples("z.csv", data, LABELS)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-8", "UTF8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl.gz"])
def test_a_file_is_read_in_the_encoding_that_is_named(tmp_path, encoding, name):
    text = as_csv(ROWS) if name == "x.csv" else '{"text": "über", "label": "good"}\n'
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    loaded = load_examples(name, DataConfig(dir=str(tmp_path), test="x", encoding=encoding), LABELS)
    assert loaded.examples.texts[-1] == "über"
    assert not loaded.warnings()


def test_rows_that_are_not_of_the_named_encoding_are_left_out_too(tmp_path):
    data = DataConfig(dir=str(tmp_path), test="x", encoding="cp1252")
    (tmp_path / "x.csv").write_bytes(b"text,label\nfine,good\nno \x81,bad\npoor,bad\n")
    loaded = load_examples("x.csv", data, LABELS)
    assert loaded.examples == Examples(["fine", "poor"], [1, 0])
    assert loaded.warnings()[0].endswith(
        "1 row (2) left out: not cp1252; save the file as UTF-8, or name its own in data.encoding"
    )
    (tmp_path / "x.csv").write_bytes("text,label\ncafé,bad\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"x\.csv: is UTF-16 and must be UTF-8 or cp1252; save it so"):
        load_examples("x.csv", data, LABELS)
    (tmp_path / "x.csv").write_bytes(b"\xff\xfet")
    with pytest.raises(
        DataError, match=r"x\.csv: is not utf-16, as data.encoding says: .*; name its own there, or save"
    ):
        load_examples("x.csv", data.model_copy(update={"encoding": "utf-16"}), LABELS)


def test_utf8_under_the_name_of_another_encoding_is_doubted_and_with_its_mark_is_read_as_it_is(tmp_path):
    data = DataConfig(dir=str(tmp_path), test="x", encoding="cp1252")
    (tmp_path / "x.csv").write_text(as_csv(ROWS), encoding="utf-8")
    [doubt] = load_examples("x.csv", data, LABELS).warnings()
    told = (
        'x.csv: read as cp1252, and its letters look like UTF-8: they may be wrong; if so, say data.encoding = "utf-8"'
    )
    assert doubt.endswith(told)
    (tmp_path / "x.csv").write_text(as_csv(ROWS), encoding="utf-8-sig")
    loaded = load_examples("x.csv", data, LABELS)
    assert loaded.examples.texts[-1] == "über"
    assert not loaded.warnings()


def test_windows_is_no_remedy_where_other_rows_are_utf8_or_the_bytes_are_not_its_own(tmp_path, data):
    for line in ("über,good\n".encode(), b"no \x81,good\n"):
        (tmp_path / "x.csv").write_bytes(b"text,label\ncaf\xe9,good\nfine,good\npoor,bad\n" + line)
        [broken] = load_examples("x.csv", data, LABELS).warnings()
        assert broken.endswith("not UTF-8; save the file as UTF-8")


def test_a_label_that_is_lost_with_rows_of_another_encoding_is_an_error(tmp_path):
    data = DataConfig(dir=str(tmp_path), test="x", label_names={"Geb": "Gebäude"})
    labels = ("Kfz", "Gebäude")
    for theirs in ("Gebäude", "Geb"):  # in bytes of its own the label cannot be read either
        rows = f"text,label\nBlech,Kfz\nDächer,{theirs}\nWände,{theirs}\nÖl,Kfz\n"
        (tmp_path / "x.csv").write_bytes(rows.encode("cp1252"))
        with pytest.raises(DataError) as caught:
            load_examples("x.csv", data, labels)
        assert str(caught.value).endswith(
            "x.csv: 2 rows (2, 3) labelled 'Gebäude' must be read, or none of that label is left: "
            'not UTF-8; save the file as UTF-8, or if it is of Windows say data.encoding = "cp1252"'
        )
    with (tmp_path / "x.csv").open("ab") as file:
        file.write(b"Keller,Geb\n")
    assert len(load_examples("x.csv", data, labels).examples) == 2
    read = load_examples("x.csv", data.model_copy(update={"encoding": "cp1252"}), labels)
    assert read.examples.class_counts(2) == [2, 3]


def test_a_name_of_a_column_in_another_encoding_is_told_as_such(tmp_path, data):
    (tmp_path / "x.csv").write_bytes("Geschäft,label\nfine,good\n".encode("cp1252"))
    with pytest.raises(DataError) as caught:
        load_examples("x.csv", data, LABELS)
    assert str(caught.value).endswith(
        "no column 'text'; its columns are: Gesch\ufffdft, label; not UTF-8; save the file as UTF-8, or if it is of "
        'Windows say data.encoding = "cp1252"; or name yours in data.text_column'
    )


@pytest.mark.parametrize("encoding", ["cp1253x", "hex", "", "a\0b"])
def test_an_encoding_that_there_is_not_is_refused_with_the_configuration(settings, encoding):
    settings["data"]["encoding"] = encoding
    with pytest.raises(ValidationError, match="must be an encoding of text that Python knows, like utf-8, cp1252"):
        Config.model_validate(settings)


def test_each_silos_files_may_have_columns_and_an_encoding_of_their_own(settings, data_folder):
    (data_folder / "a.csv").write_bytes("Meldung;,Sparte,text\nHügel,good,x\nfein,bad,y\n".encode("cp1252"))
    (data_folder / "a-test.csv").write_bytes("Meldung;,Sparte\nTür,good\n".encode("cp1252"))
    (data_folder / "b.jsonl").write_text('{"text": "grün", "kind": "bad"}\n{"text": "rot", "kind": "good"}\n')
    own = {"text_column": "Meldung;", "label_column": "Sparte", "encoding": "cp1252"}
    a = {"id": "a", "train": "a.csv", "test": "a-test.csv", **own}
    b = {"id": "b", "train": "b.jsonl", "label_column": "kind"}
    settings["data"] = {"dir": str(data_folder), "test": "test.csv"}
    split = load_split(Config.model_validate(settings | {"clients": [a, b]}))
    assert split.private == {"a": Examples(["Hügel", "fein"], [1, 0]), "b": Examples(["grün", "rot"], [0, 1])}
    assert split.tests["a"] == Examples(["Tür"], [1])
    del b["label_column"]
    with pytest.raises(DataError) as caught:
        load_split(Config.model_validate(settings | {"clients": [a, b]}))
    assert str(caught.value).endswith(
        "b.jsonl: row 1 has no column 'label'; its columns are: text, kind; name yours in clients.b.label_column "
        '(or data.label_column, for all silos without their own), or say data.skip_labels = [""] to leave out rows '
        "without a label"
    )
    a["text_column"] = "Text"
    with pytest.raises(
        DataError, match=r"a\.csv: no column 'Text'; .*; name yours in clients\.a\.text_column \(or data"
    ):
        load_split(Config.model_validate(settings | {"clients": [a, b]}))


def test_a_silos_own_columns_must_be_two(settings, data_folder):
    settings["data"] = {"dir": str(data_folder), "test": "test.csv"}
    clients = [{"id": "a", "train": "a.csv", "text_column": "label"}]
    with pytest.raises(
        ValidationError, match=r"clients\.a: text_column and label_column must be two .* 'label' for both"
    ):
        Config.model_validate(settings | {"clients": clients})


@pytest.mark.parametrize(("label", "kind"), [(["bad", "good"], "a list"), ({"a": 1}, "an object")])
def test_a_row_has_one_label(tmp_path, data, label, kind):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "fine", "label": label}) + "\n")
    with pytest.raises(DataError) as caught:
        load_examples("x.jsonl", data, LABELS)
    assert str(caught.value).endswith(
        f"x.jsonl: row 1 has {kind} in the column 'label', and a row has one label: write that one, or where a text "
        "may have several make a task of yes and no for each"
    )


def test_spaces_around_names_of_columns_and_labels_do_not_count(tmp_path, data):
    (tmp_path / "x.csv").write_text("text, label \nfine, good\n")
    assert load_examples("x.csv", data, LABELS).examples == Examples(["fine"], [1])


def test_all_labels_that_are_unknown_are_named_with_what_they_may_mean(tmp_path, data):
    (tmp_path / "x.csv").write_text("text,label\na,Good\nb,good\nc,gud\nd,Good\n")
    told = r"row 1 \(and 1 more\) has the label 'Good'; did you mean 'good'\?, row 3 has the label 'gud'"
    with pytest.raises(DataError, match=told):
        load_examples("x.csv", data, LABELS)


def test_spaces_around_labels_count_nowhere(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na, fine \nb,bad\n")
    data = DataConfig(dir=str(tmp_path), test="x", label_names={" fine": "good "})
    assert load_examples("x.csv", data, ("bad ", "good ")).examples.labels == [1, 0]


def test_a_column_that_is_there_twice_is_named(tmp_path, data):
    (tmp_path / "x.csv").write_text("text , text,label\na,b,good\n")
    with pytest.raises(DataError, match=r"x\.csv: has the column 'text' twice; give each a name of its own"):
        load_examples("x.csv", data, LABELS)


def test_other_columns_may_be_alike_and_have_no_name(tmp_path, data):
    (tmp_path / "x.csv").write_text("id,text,id,label,,\n1,fine,2,good,,\n")
    assert load_examples("x.csv", data, LABELS).examples == Examples(["fine"], [1])


def test_of_columns_that_look_like_text_the_others_are_named(tmp_path, data):
    (tmp_path / "x.csv").write_text("id,The whole review of it,label\n1,b,good\n")
    with pytest.raises(DataError, match=r"no column 'text'; its columns are: id, \.\.\., label; is the first line one"):
        load_examples("x.csv", data, LABELS)


SECRET = "Patient Jane Roe was seen on Monday and was told of it"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", f"{SECRET},bad\nanother,good\n"),
        ("x.csv", f"text,label\nbad,{SECRET}\n"),
        ("x.csv", "text,label\nbad,Jane Roe has HIV\n"),
        ("x.jsonl", json.dumps([SECRET]) + "\n"),
        ("x.jsonl", f"{SECRET}\n"),
    ],
)
def test_an_error_quotes_no_private_text(tmp_path, data, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_examples(name, data, LABELS)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "text,lable\na,good\n", r"x.csv: no column 'label'; its columns are: text, lable"),
        (
            "x.csv",
            "text,label\na,fair\n",
            r"x.csv: row 1 has the label 'fair'; the task's labels are \['bad', 'good'\]",
        ),
        ("x.jsonl", '{"text": "a"}\n', r"x.jsonl: row 1 has no column 'label'; its columns are: text"),
        (
            "x.csv",
            "text;label\na;good\n",
            r"x.csv: no column 'text'; its columns are: text;label; separate fields by comm",
        ),
        ("x.csv", "body,label\na,good\n", r"its columns are: body, label; name yours in data.text_column"),
        ("x.jsonl", '{"text": "a", "class": 1}\n', r"columns are: text, class; name yours in data.label_column"),
        ("x.csv", "label,text\ngood,Hello, world\n", r"x.csv: line 2 has more fields than the header; put texts with"),
        ("x.csv", "text,label\na,good\nb\n", r"x.csv: row 2 has a text and no label: are there too few fields, or"),
        ("x.jsonl", '{"text": "a", "label": null}\n', r"x.jsonl: row 1 has a text and no label"),
        ("x.jsonl", "{text}\n", r"x.jsonl: line 1 is not JSON"),
        ("x.jsonl", "[1]\n", r"x.jsonl: line 1 must be an object"),
        ("x.txt", "a", r"x.txt: must be .csv"),
        ("x.csv.gz", "not gzip", r"x.csv.gz: cannot be read"),
        (
            "x.csv",
            'text,label\n"' + "a" * 200_000 + ",good\n",
            r"x.csv: line 2 is not CSV, or begins a row that is not",
        ),
        (
            "x.csv",
            'label,text\ngood,one\nbad,"two\ngood,three\n',
            r"x.csv: line 3 is not CSV.*a quote that is not closed",
        ),
        ("x.csv", 'text,label\n"a,good\nb,bad\n"c",good\nd,bad\n', r"x.csv: line 2 is not CSV"),
        ("x.csv", 'text,label\n"He said "hi" there",good\n', r"x.csv: line 2 is not CSV.*not doubled"),
        ("x.csv", 'text,"label\na,good\n', r"x.csv: line 1 is not CSV"),
        ("x.csv", "\n \ntext,label\na,good\nb,bad,c\n", r"x.csv: line 5 has more fields than the header"),
        ("x.csv", '\n\ntext,label\n"a,good\n', r"x.csv: line 4 is not CSV"),
        ("x.csv", "\n\n", r"x.csv: is empty"),
        ("x.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", r"x.jsonl: line 1 is not JSON"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(tmp_path, data, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(name, data, LABELS)


def test_a_long_text_with_quotes_and_line_breaks_is_one_row(tmp_path, data):
    text = 'she said "no", and\r\n' * 10_000
    (tmp_path / "x.csv").write_bytes(as_csv([(text, "bad"), ("short", "good")]).encode())
    loaded = load_examples("x.csv", data, LABELS)
    assert loaded.examples.texts == [" ".join(text.split()), "short"]


def test_a_missing_file_says_where_to_set_the_folder(data):
    with pytest.raises(DataError, match=r"none\.csv: no such file; set data.dir or --data-dir .* name another file"):
        load_examples("none.csv", data, LABELS)


def test_a_home_that_is_not_there_is_a_folder_that_is_not_there(data):
    elsewhere = data.model_copy(update={"dir": "~nobody-of-this-name/x"})
    with pytest.raises(DataError, match=r"no such file; set data\.dir"):
        load_examples("none.csv", elsewhere, LABELS)


def test_a_hub_dataset_by_the_same_way_from_a_local_folder(tmp_path, data):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text(as_csv(ROWS))
    loaded = load_examples(f"hf:{folder}:train", data, LABELS)
    assert loaded.examples.labels == [1, 0, 1]
    with pytest.raises(DataError, match="must look like hf:DATASET:SPLIT"):
        load_examples("hf:glue", data, LABELS)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_examples("hf:nobody/nothing:train", data, LABELS)


def hub_table(monkeypatch, names, **columns):
    """Have the hub give this table for any name; gives the list of what it is asked for."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table, asked = datasets.Dataset.from_dict(columns, features=features), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or table)
    return asked


def test_numbered_labels_of_a_hub_dataset_are_named_by_its_features(data, monkeypatch):
    asked = hub_table(monkeypatch, ["bad", "good"], text=["x", "y"], label=[1, 0])
    assert load_examples("hf:owner/name/config:test", data, LABELS).examples == Examples(["x", "y"], [1, 0])
    assert asked == [("owner/name", "config", "test")]


def test_a_hub_split_that_is_published_without_labels_is_named_with_its_row(data, monkeypatch):
    hub_table(monkeypatch, ["bad", "good"], text=["x", "y"], label=[1, -1])
    with pytest.raises(DataError, match=r"hf:owner/name:test: row 2 has the label -1.*\['bad', 'good'\].* another"):
        load_examples("hf:owner/name:test", data, LABELS)


@pytest.mark.parametrize(
    ("name", "names", "labels"),
    [
        ("imdb", ["neg", "pos"], ["negative", "positive"]),
        ("ag_news", ["World", "Sports", "Business", "Sci/Tech"], ["World", "Sports", "Business", "Sci-Tech"]),
    ],
)
def test_packaged_configurations_know_what_the_hub_calls_their_labels(name, names, labels, monkeypatch):
    config = load(name)
    assert list(config.task.labels) == labels
    hub_table(monkeypatch, names, text=["x"] * len(names), label=list(range(len(names))))
    loaded = load_examples("hf:owner/name:train", config.data, config.task.labels)
    assert loaded.examples.labels == list(range(len(names)))


def test_a_file_may_have_other_names_for_the_labels(tmp_path):
    data = DataConfig(dir=str(tmp_path), test="x", label_names={"0": "bad", "fine": "good"})
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "a", "label": {label}}}\n' for label in ("0", '"fine"')))
    (tmp_path / "x.csv").write_text("text,label\na,0\nb,good\nc,1\n")
    assert load_examples("x.jsonl", data, LABELS).examples.labels == [0, 1]
    with pytest.raises(DataError, match=r"row 3 has the label '1'; the task's labels .* say in data.label_names"):
        load_examples("x.csv", data, LABELS)


def test_labels_of_json_are_called_as_json_writes_them(tmp_path, data):
    lines = [{"text": "a", "label": label} for label in (True, False, "true")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_examples("x.jsonl", data, ("false", "true")).examples.labels == [1, 0, 1]
    with pytest.raises(DataError, match=r"row 1 \(and 1 more\) has the label 'true', row 2 has the label 'false'"):
        load_examples("x.jsonl", data, LABELS)
    (tmp_path / "y.jsonl").write_text('{"text": "a", "label": 1.0}\n{"text": "b", "label": 0.5}\n')
    assert load_examples("y.jsonl", data, ("0.5", "1")).examples.labels == [1, 0]
    (tmp_path / "x.csv").write_text("text,label\na,1.0\n")  # there it is a name like any other
    assert load_examples("x.csv", data, ("0.0", "1.0")).examples.labels == [1]


def test_a_row_of_json_without_the_key_of_the_label_has_none(tmp_path, data):
    skips = data.model_copy(update={"skip_labels": ("",)})
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": "good"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r'x\.jsonl: row 2 has a text and no label.*data\.skip_labels = \[""\]'):
        load_examples("x.jsonl", data, LABELS)
    loaded = load_examples("x.jsonl", skips, LABELS)
    assert loaded.examples == Examples(["a"], [1])
    assert loaded.warnings()[0].endswith("x.jsonl: 1 row (2) left out: no label")
    (tmp_path / "y.jsonl").write_text('{"text": "b"}\n{"text": "a", "label": "good"}\n')
    told = r"y\.jsonl: row 1 has no column 'label'.* name yours in data\.label_column"
    with pytest.raises(DataError, match=rf'{told}, or say data\.skip_labels = \[""\] to leave out rows'):
        load_examples("y.jsonl", data, LABELS)
    assert load_examples("y.jsonl", skips, LABELS).examples == Examples(["a"], [1])
    (tmp_path / "z.jsonl").write_text('{"text": "b", "class": "good"}\n' * 2)  # and not all of them for want of it
    with pytest.raises(DataError, match=r"z\.jsonl: row 1 has no column 'label'; .* name yours in data\.label_column$"):
        load_examples("z.jsonl", skips, LABELS)


def test_a_name_of_no_label_of_the_task_is_refused(settings):
    settings["data"]["label_names"] = {"neg": "negative"}
    with pytest.raises(ValidationError, match=r"data.label_names gives \['negative'\]; .*\['bad', 'good'\]"):
        Config.model_validate(settings)


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=300),
    st.integers(1, 6),
    st.floats(0.05, 100),
    st.one_of(st.none(), st.integers(1, 50)),
    st.integers(0, 2**32),
)
def test_the_split_gives_everyone_as_many_rows_and_no_row_twice(labels, clients, alpha, rows, seed):
    parts = dirichlet_split(labels, clients, alpha, rows, seed)
    share = len(labels) // clients
    assert [len(part) for part in parts] == [share if rows is None else min(rows, share)] * clients
    everything = [row for part in parts for row in part]
    assert len(set(everything)) == len(everything)
    assert parts == dirichlet_split(labels, clients, alpha, rows, seed)


def test_alpha_decides_the_skew():
    labels = [0, 1] * 2000

    def shares(alpha):
        return [sum(labels[row] for row in part) / len(part) for part in dirichlet_split(labels, 4, alpha, 200, 3)]

    assert all(share < 0.05 or share > 0.95 for share in shares(0.01))
    assert all(0.4 < share < 0.6 for share in shares(10_000))


def test_a_balanced_sample_has_as_many_of_each():
    examples = Examples([str(i) for i in range(100)], [0] * 90 + [1] * 10)
    assert balanced_sample(examples, 10, 2, 0).class_counts(2) == [5, 5]
    assert balanced_sample(examples, 40, 2, 0).class_counts(2) == [30, 10]
    assert balanced_sample(examples, None, 2, 0) is examples


def test_no_row_serves_two_purposes(config):
    split = load_split(config)
    parts = [*split.private.values(), split.judge]
    # the corpus has some equal sentences, so rows are told apart by how often each occurs
    together = Counter(text for part in parts for text in part.texts)
    everything = load_examples("train.csv", config.data, config.task.labels).examples
    assert not together - Counter(everything.texts)
    assert len(split.judge) == 10


def test_clients_with_their_own_files(settings, data_folder):
    settings["data"].pop("train")
    settings["clients"] = [{"id": "a", "train": "train.csv", "test": "test.csv"}, {"id": "b", "train": "test.csv"}]
    split = load_split(Config.model_validate(settings))
    assert (len(split.private["a"]), len(split.private["b"]), len(split.judge)) == (60, 20, 0)
    assert (len(split.tests["a"]), len(split.tests["b"])) == (20, 20)


def test_clients_with_their_own_files_have_no_more_rows_than_is_set(settings, data_folder):
    settings["data"] |= {"rows_per_client": 15}
    settings["data"].pop("train")
    settings["clients"] = [{"id": "a", "train": "train.csv"}, {"id": "b", "train": "test.csv"}]
    split = load_split(Config.model_validate(settings))
    assert [len(rows) for rows in split.private.values()] == [15, 15]


def test_a_judge_with_a_file_of_its_own_has_no_more_rows_than_is_set(settings):
    settings["data"] |= {"judge": "test.csv", "judge_rows": 5}
    assert len(load_split(Config.model_validate(settings)).judge) == 5


def test_every_seed_is_measured_on_the_same_rows(config):
    few = {
        "data": config.data.model_copy(update={"test_rows": 6}),
        "evaluation": config.evaluation.model_copy(update={"nlu_rows": 4}),
    }
    seeds = [config.model_copy(update={"seed": seed, **few}) for seed in (1, 2, 3)]
    first, *others = [load_split(each).test for each in seeds]
    assert others == [first] * 2 == [rows_to_test(each, pytest.fail) for each in seeds[1:]]
    everything = load_split(config).test
    first, *others = [nlu_rows(each, everything) for each in seeds]
    assert others == [first] * 2


def test_a_clients_own_test_rows_are_balanced_too(settings, data_folder):
    skewed = "".join(f"a text of number {row},{'good' if row < 3 else 'bad'}\n" for row in range(30))
    (data_folder / "skewed.csv").write_text("text,label\n" + skewed)
    settings["data"] = {**settings["data"], "test_rows": 6}
    settings["data"].pop("train")
    settings["clients"] = [{"id": "a", "train": "train.csv", "test": "skewed.csv"}, {"id": "b", "train": "train.csv"}]
    split = load_split(Config.model_validate(settings))
    assert sorted(split.tests["a"].labels) == [0, 0, 0, 1, 1, 1]
    assert len(split.tests["b"]) == 6


def test_an_empty_silo_is_refused_and_one_of_a_single_class_warned_of(settings, data_folder):
    settings["data"].pop("train")
    settings["clients"] = [{"id": "a", "train": "one.csv"}]
    (data_folder / "one.csv").write_text("text,label\nx,good\ny,good\n")
    split = load_split(Config.model_validate(settings))
    assert split.warnings == ["client a: all 2 rows are 'good'; its classifier can learn nothing else"]
    hides = Config.model_validate(settings | {"privacy": {"hide_counts": True}})
    assert load_split(hides).warnings == []  # they are written into the run folder
    (data_folder / "one.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"client a: one\.csv: no usable training rows"):
        load_split(Config.model_validate(settings))
    settings["clients"] = [{"id": "a", "train": "train.csv", "test": "one.csv"}]
    with pytest.raises(DataError, match=r"client a: one.csv: no usable test rows"):
        load_split(Config.model_validate(settings))


def test_rows_and_lines_that_are_left_out_are_told_of_every_file(settings, data_folder):
    told = []
    (data_folder / "some.csv").write_bytes(b"text,label\nfine,good\ncaf\xe9,bad\npoor,bad\n")
    settings["gate"] = {"public_texts": "some.csv"}
    settings["data"]["test"] = "some.csv"
    config = Config.model_validate(settings)
    assert len(public_texts(config, told.append)) == len(rows_to_test(config, told.append)) == 2
    windows = 'or if it is of Windows say data.encoding = "cp1252"'
    left_out = f"some.csv: 1 row (2) left out: not UTF-8; save the file as UTF-8, {windows}"
    assert [line.split("/")[-1] for line in told] == [left_out] * 2
    assert readable_lines(data_folder / "some.csv", told.append) == ["text,label", "fine,good", "poor,bad"]
    assert told[-1].endswith("some.csv: 1 of 4 lines left out: not UTF-8")


def test_too_few_rows_for_judge_and_clients_names_the_field(config):
    data = config.data.model_copy(update={"judge_rows": 59})
    with pytest.raises(DataError, match=r"train.csv: has 60 usable rows; data.judge_rows = 59"):
        load_split(config.model_copy(update={"data": data}))


def test_line_separators_within_json_text_do_no_harm(tmp_path, data):
    (tmp_path / "x.jsonl").write_text('{"text": "a\u2028b", "label": "good"}\n', encoding="utf-8")
    assert load_examples("x.jsonl", data, LABELS).examples == Examples(["a b"], [1])


def test_rows_of_other_labels_and_of_none_can_be_left_out(settings, data_folder):
    (data_folder / "odd.csv").write_text("text,label\na,good\nb,gone\nc,\nd,bad\ne, gone \n")
    data = Config.model_validate(settings).data
    with pytest.raises(DataError, match=r"row 3 has a text and no label.*data.skip_labels = \[\"\"\]"):
        load_examples("odd.csv", data, ["good", "bad"])
    with pytest.raises(
        DataError, match=r"row 2 \(and 1 more\) has the label 'gone'.*or leave its rows out by data.skip"
    ):
        load_examples("odd.csv", data.model_copy(update={"skip_labels": ("",)}), ["good", "bad"])
    loaded = load_examples("odd.csv", data.model_copy(update={"skip_labels": ("", "gone")}), ["good", "bad"])
    assert loaded.examples.texts == ["a", "d"]
    source = data_folder / "odd.csv"
    assert sorted(loaded.warnings()) == [
        f"{source}: 1 row (3) left out: no label",
        f"{source}: 2 rows (2, 5) left out: labelled 'gone'",
    ]


def test_test_rows_that_are_trained_on_are_told(settings, data_folder):
    settings["data"].pop("train")
    settings["data"]["judge"] = "judge.csv"
    settings["clients"] = [{"id": "a", "train": "mine.csv"}, {"id": "b", "train": "other.csv"}]
    tested = (data_folder / "test.csv").read_text().splitlines()
    own = "Mine,good\nMy own,bad\n"
    (data_folder / "mine.csv").write_text("\n".join(tested[:3]) + "\n" + own)
    (data_folder / "other.csv").write_text("text,label\n" + own)
    (data_folder / "judge.csv").write_text("\n".join(tested[:2]) + "\n" + own)
    warnings = load_split(Config.model_validate(settings)).warnings
    assert [line.partition(", on which")[0] for line in warnings] == [
        "client a: 2 of its training rows are test rows too",
        "the judge: 1 of its training rows is a test row too",
        # the judge has learned what the rewards come from
        *(
            f"the judge learns {count} of the rows that client {name} has, and is no independent judge of what is "
            "learned from these; take them out of data.judge"
            for name, count in (("a", 3), ("b", 2))
        ),
    ]
    one_file = {**settings["data"], "judge": None, "judge_rows": 12, "train": "train.csv"}
    repeated = Config.model_validate({**settings, "clients": [], "data": one_file})
    rows = (data_folder / "train.csv").read_text().splitlines()
    (data_folder / "train.csv").write_text("\n".join([rows[0], *rows[1:] * 2]) + "\n")
    assert "take out of train.csv what is there twice" in load_split(repeated).warnings[-1]
    hides = Config.model_validate(settings | {"privacy": {"hide_counts": True}})
    assert "the judge learns some of the rows that client a has" in load_split(hides).warnings[-2]


def test_sample_rows_are_told_and_no_count_where_counts_are_hidden(settings, data_folder):
    settings["data"].pop("train")
    settings["data"]["judge"] = "judge.csv"
    settings["clients"] = [{"id": "a", "train": "mine.csv"}]
    tested = (data_folder / "test.csv").read_text().splitlines()
    rows = "\n".join(tested[:4]) + "\nReplace this row: a text of good.,good\n"
    (data_folder / "mine.csv").write_text(rows)
    (data_folder / "judge.csv").write_text("text,label\nTheirs,good\nTheir own,bad\n")
    sample, seen = load_split(Config.model_validate(settings)).warnings
    assert sample == "client a: learns sample rows of crosslm init: put your own in their place"
    assert seen.startswith("client a: 3 of its training rows are test rows too")
    hides = Config.model_validate(settings | {"privacy": {"hide_counts": True}})
    assert load_split(hides).warnings[1].startswith("client a: some of its training rows are test rows too")
