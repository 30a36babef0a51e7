"""A finished run is used: prediction, generation and the Python behind both."""

import csv
import gzip
import io
import json
import re
import shutil
import sys
import tomllib

import pytest
import tomli_w
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

import crosslm
from crosslm.cli import main as cli
from crosslm.data.rows import RowFormat, format_of, rows_of, rows_of_file, write_rows
from crosslm.errors import ConfigError, DataError, ModelError, RunError
from crosslm.runs import cards
from crosslm.runs.export import export_run
from crosslm.runs.finished import ROWS_AT_ONCE, Run, classified


@pytest.fixture(scope="module")
def finished(workplace):
    return Run.open(workplace / "runs" / "tickets-1", workplace / "cache")


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


LABELS = ("routine", "urgent")


def test_predictions_are_those_of_the_classifier(finished, workplace):
    texts = ["a good film.", "an awful day", "a kind song."]
    found = finished.predict("north", texts)
    classify = pipeline("text-classification", model=str(finished.slm_folder("north")), device="cpu")
    for prediction, expected in zip(found, classify(texts), strict=True):
        assert prediction.label == expected["label"]
        assert prediction.probability == pytest.approx(expected["score"], abs=1e-5)
    assert finished.clients == ("north", "south")


def test_a_csv_gets_two_columns_and_its_accuracy_is_told_beside_it(shell, workplace, finished):
    run = workplace / "runs" / "tickets-1"
    code, out, err = shell("predict", run, "--client", "south", workplace / "test.csv")
    assert code == 0, err
    rows = table(out)
    assert list(rows[0]) == ["text", "label", "predicted", "probability"]
    assert len(rows) == 24
    expected = finished.predict("south", [row["text"] for row in rows])
    assert [row["predicted"] for row in rows] == [prediction.label for prediction in expected]
    right = sum(row["predicted"] == row["label"] for row in rows) / len(rows)
    found = {label: [row["predicted"] == label for row in rows if row["label"] == label] for label in LABELS}
    told = ", ".join(f"{label} {sum(mine) / len(mine):.3f} of 12" for label, mine in found.items())
    assert err.startswith(f"accuracy {right:.3f} [")
    assert "] on 24 rows that have a label; macro-F1 " in err
    assert err.endswith(f"; found of each label: {told}\n")
    own, theirs = (
        shell("predict", run, "--client", "south", workplace / "test.csv", *more)[1] for more in (("--own",), ())
    )
    uploaded = pipeline("text-classification", model=str(run / "uploads" / "south"), device="cpu")
    said = uploaded([row["text"] for row in rows])
    assert [row["predicted"] for row in table(own)] == [each["label"] for each in said]
    assert own != theirs


def test_it_says_where_the_client_kept_another_one(shell, workplace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workplace / "runs" / "tickets-1", run)
    summary = json.loads((run / "summary.json").read_text())
    summary["clients"]["north"]["decision"] = {"accepted": False, "rows": 20, "before": 0.9, "after": 0.5}
    (run / "summary.json").write_text(json.dumps(summary))
    code, _, err = shell("predict", run, "--client", "north", workplace / "test.csv")
    assert code == 0, err
    told = (
        f"north kept the classifier that it had, which this is; the one that came back, in {run / 'slm' / 'north'}, is"
    )
    assert err.startswith(told)
    kept = Run.open(run)
    assert kept.slm_folder("north") == kept.slm_folder("north", own=True) == run / "uploads" / "north"
    assert kept.slm_folder("north", own=False) == run / "slm" / "north"
    assert kept.slm_folder("south") == run / "slm" / "south"
    export_run(kept, tmp_path / "shared", ("slm",))
    for name, folder in (("north", "uploads"), ("south", "slm")):
        weights = (run / folder / name / "model.safetensors").read_bytes()
        assert (tmp_path / "shared" / "slm" / name / "model.safetensors").read_bytes() == weights
    card = (tmp_path / "shared" / "slm" / "north" / "README.md").read_text()
    assert "Its owner kept it: the one that came back was worse on its owner's held-out rows" in card
    summary["clients"]["north"]["decision"]["refused"] = "LeakError: a text"
    twice = kept.config.federation.model_copy(update={"participations": 2})
    config = kept.config.model_copy(update={"federation": twice})
    card_then = cards.slm_card("north", 0, config, summary, own=True)
    assert (
        "on private text and on what earlier rounds brought. Its owner kept it: the one that came back was" in card_then
    )
    assert "refused there (LeakError)" in card_then
    assert "| private text only" not in card_then
    assert "Not measured by itself" in card_then
    assert "| private text only (this model) |" in card
    card = cards.slm_card("north", 1, kept.config, kept.summary)
    assert "**Its owner did not accept it, and uses the one that it had before**" in card
    assert "| CrossLM (this model) |" in card
    code, _, err = shell("predict", run, "--client", "south", workplace / "test.csv")
    assert (code, "kept" in err) == (0, False)
    code, _, err = shell("predict", run, "--client", "north", "--own", workplace / "test.csv")
    assert (code, "kept" in err) == (0, False)
    shutil.rmtree(run / "uploads")
    code, _, err = shell("predict", run, "--client", "north", "--own", workplace / "test.csv")
    assert (code, f"look at {run / 'slm' / 'north'}, which is what came back" in err) == (2, True)


def test_labels_under_the_names_of_the_data_count_as_theirs(shell, workplace, tmp_path):
    shutil.copytree(workplace / "runs" / "tickets-1", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    given = tomllib.loads(config.read_text())
    given["data"]["label_names"] = {"R": "routine", "U": "urgent"}
    config.write_text(tomli_w.dumps(given))
    rows = (workplace / "test.csv").read_text().replace(",routine", ",R").replace(",urgent", ",U")
    (tmp_path / "test.csv").write_text(rows)
    told = [
        shell("predict", tmp_path / "run", "--client", "south", here / "test.csv") for here in (workplace, tmp_path)
    ]
    assert [code for code, _, _ in told] == [0, 0]
    assert told[0][2] == told[1][2] != ""


def test_the_columns_are_those_of_the_clients_own_rows(shell, workplace, tmp_path):
    shutil.copytree(workplace / "runs" / "tickets-1", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    given = tomllib.loads(config.read_text())
    given["clients"][1] |= {"text_column": "body", "label_column": "kind"}
    config.write_text(tomli_w.dumps(given))
    rows = (workplace / "test.csv").read_text().replace("text,label", "body,kind")
    (tmp_path / "test.csv").write_text(rows)
    code, out, err = shell("predict", tmp_path / "run", "--client", "south", tmp_path / "test.csv")
    assert (code, out.splitlines()[0].split(",")[:2]) == (0, ["body", "kind"])
    assert "rows that have a label" in err


def test_labels_that_the_task_does_not_know_are_told_since_they_do_not_count(shell, workplace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workplace / "runs" / "tickets-1", run)
    given = tomllib.loads((run / "config.toml").read_text())
    given["data"]["skip_labels"] = ["gone"]
    (run / "config.toml").write_text(tomli_w.dumps(given))
    rows = "a day,routine\n" * 3 + "a day,Urgent\n" * 7 + "a day,\na day,gone\n,Urgent\n"
    (tmp_path / "x.csv").write_text(f"text,label\n{rows}")
    code, _, err = shell("predict", run, "--client", "north", tmp_path / "x.csv")
    assert code == 0, err
    told = "7 rows have a label that the task does not know ('Urgent') and do not count; its labels are: routine,"
    assert err.startswith(f"warning: {told} urgent\naccuracy ")
    assert "] on 3 rows that have a label" in err
    names = [*"abcdefg", "Jane Roe was seen on Monday"]
    (tmp_path / "y.csv").write_text("text,label\n" + "".join(f"a day,{name}\n" for name in reversed(names)))
    code, _, err = shell("predict", run, "--client", "north", tmp_path / "y.csv")
    assert "8 rows have a label that the task does not know (..., 'g', 'f', 'e', 'd', ...) and do" in err
    (tmp_path / "z.csv").write_text("text,label\na day,Urgent\n")
    code, _, err = shell("predict", run, "--client", "north", tmp_path / "z.csv")
    assert err.startswith("warning: 1 row has a label that the task does not know ('Urgent') and does not count;")
    assert (code, "accuracy" in err) == (0, False)


def test_labels_of_json_are_called_as_json_writes_them(shell, workplace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workplace / "runs" / "tickets-1", run)
    given = tomllib.loads((run / "config.toml").read_text())
    given["data"]["label_names"] = {"1": "routine", "true": "urgent"}
    (run / "config.toml").write_text(tomli_w.dumps(given))
    labels = [1, 1.0, True, False, None]
    rows = "".join(json.dumps({"text": "a day", "label": label}) + "\n" for label in labels)
    (tmp_path / "x.jsonl").write_text(rows)
    code, _, err = shell("predict", run, "--client", "north", tmp_path / "x.jsonl")
    assert code == 0, err
    assert "1 row has a label that the task does not know ('false')" in err
    assert "] on 3 rows that have a label" in err


def test_each_line_that_is_not_utf8_counts(shell, workplace, tmp_path):
    (tmp_path / "x.csv").write_bytes(b"text\ncaf\xe9\ncaf\xe9s\n")
    code, _, err = shell("predict", workplace / "runs" / "tickets-1", "--client", "north", tmp_path / "x.csv")
    told = "warning: 2 lines are not whole UTF-8 and were read with \ufffd in them; save the file as UTF-8\n"
    assert (code, err) == (0, told)


def test_standard_input_is_a_text_a_line_and_only_rows_go_to_standard_output(shell, workplace):
    run = workplace / "runs" / "tickets-1"
    code, out, err = shell("predict", run, "--client", "north", stdin="a good, warm day\n\nan awful day \xe9\n")
    assert (code, err) == (0, "")
    rows = table(out)
    assert [row["text"] for row in rows] == ["a good, warm day", "", "an awful day \xe9"]
    assert [bool(row["predicted"]) for row in rows] == [True, False, True]
    code, out, _ = shell(
        "predict", run, "--client", "north", "--format", "csv", "--text-column", "body", "--jsonl", "-",
        stdin='id,body\n7,"a good, warm day"\n',
    )  # fmt: skip
    assert code == 0
    row = json.loads(out)
    assert (row["id"], row["body"]) == ("7", "a good, warm day")
    assert row["predicted"] in ("routine", "urgent")


def test_what_is_not_utf8_is_counted_and_what_is_only_odd_is_not(shell, workplace, tmp_path):
    run = workplace / "runs" / "tickets-1"
    (tmp_path / "x.csv").write_bytes("text, label\na \ufffd day, routine\n".encode() + b"caf\xe9,urgent\n")
    code, out, err = shell("predict", run, "--client", "north", tmp_path / "x.csv")
    assert code == 0
    assert [row["text"] for row in table(out)] == ["a \ufffd day", "caf\ufffd"]
    assert "warning: 1 line is not whole UTF-8 and was read with \ufffd in it; save" in err
    assert re.search(r"accuracy \S+ \[\S+ \S+\] on 2 rows that have a label", err)


def test_half_a_character_that_json_escapes_loses_no_row(shell, workplace, tmp_path):
    run = workplace / "runs" / "tickets-1"
    lines = [{"text": "a good \ud83d day", "label": None, "more": ["\udc00"]}, {"text": "a day", "label": "urgent"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = shell("predict", run, "--client", "north", tmp_path / "x.jsonl")
    assert code == 0, err
    first, second = map(json.loads, out.splitlines())
    assert (first["text"], first["more"]) == ("a good \ufffd day", ["\ufffd"])
    assert None not in (first["predicted"], second["predicted"])
    assert "warning: 1 line is not whole UTF-8 and was" in err
    assert re.search(r"accuracy \S+ \[\S+ \S+\] on 1 rows that have a label", err)


def test_a_row_without_a_label_is_none_of_the_label_none(shell, workplace, tmp_path, monkeypatch):
    slm = Run.open(workplace / "runs" / "tickets-1").slm("north")
    slm.labels = ("None", "urgent")
    monkeypatch.setattr(Run, "slm", lambda *_: slm)
    (tmp_path / "x.jsonl").write_text('{"text": "a day", "label": null}\n{"text": "a day"}\n')
    code, _, err = shell("predict", workplace / "runs" / "tickets-1", "--client", "north", tmp_path / "x.jsonl")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("name", ["predicted", "probability"])
def test_a_column_that_predict_writes_is_not_written_over(shell, workplace, tmp_path, name):
    (tmp_path / "x.csv").write_text(f"text,{name}\na day,mine\n")
    output = tmp_path / "out.csv"
    code, _, err = shell(
        "predict", workplace / "runs" / "tickets-1", "--client", "north", tmp_path / "x.csv", "--output", output
    )
    assert (code, output.exists()) == (2, False)
    assert f"the rows have a column '{name}', which is what is written here: give it another name" in err


def test_rows_are_utf8_wherever_they_go(workplace, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.argv", ["crosslm", "predict", str(workplace / "runs" / "tickets-1"), "--client", "north"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("gut für 5 €\n".encode())))
    monkeypatch.setattr(sys, "stdout", plain)
    with pytest.raises(SystemExit):
        cli.main()
    plain.flush()
    assert table(plain.buffer.getvalue().decode("utf-8"))[0]["text"] == "gut für 5 €"


def test_a_pipe_is_read_no_further_than_needed(finished):
    slm, taken = finished.slm("north"), []

    def endless():
        while True:
            taken.append(1)
            yield {"text": "a good film"}

    rows = classified(slm, endless(), "text")
    assert next(rows)["predicted"] in slm.labels
    assert len(taken) == ROWS_AT_ONCE


def test_columns_without_a_name_are_no_columns_of_one_name():
    rows = list(rows_of(io.BytesIO(b"text,,\na,b,c\n"), "here", "text", RowFormat.csv))
    assert rows == [{"text": "a", "unnamed 2": "b", "unnamed 3": "c"}]
    rows = list(rows_of(io.BytesIO(b",text\n7,a\n"), "here", "text", RowFormat.csv))  # as pandas writes its index
    assert rows == [{"": "7", "text": "a"}]
    with pytest.raises(DataError, match="here: has the column 'unnamed 3' twice; give each a name of its own"):
        list(rows_of(io.BytesIO(b"text,,,unnamed 3\na,b,c,d\n"), "here", "text", RowFormat.csv))


def test_bytes_that_are_not_utf8_lose_no_row():
    rows = list(rows_of(io.BytesIO(b"fine\r\nbr\xffken\n"), "here", "text", RowFormat.text))
    assert [row["text"] for row in rows] == ["fine", "br\ufffdken"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'body\n"x"\n', r"a.csv: row 1 has no column 'text'; its columns are: body; .*--text-column"),
        ("a.csv", "text\nx,y\n", "a.csv: line 2 has more fields than the header"),
        ("a.csv", 'text,id\na,1\n"b,2\nc,3\n', "a.csv: line 3 is not CSV"),
        (
            "a.csv",
            'text;label\n"a";"b"\n',
            r"no column 'text'; its columns are: text;label; separate fields by commas$",
        ),
        ("a.csv", "A patient was seen today,x\nb,y\n", r"columns are: \.\.\., x; is the first line one of names\? Put"),
        ("a.csv", "\n", "a.csv: is empty; it must begin with the names of its columns"),
        ("a.csv", "text,text\na,b\n", "a.csv: has the column 'text' twice; give each a name of its own"),
        ("a.csv", "text,id,id\na,1,2\n", "a.csv: has the column 'id' twice"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}\n", "a.jsonl: line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl: line 1 must be an object"),
        ("a.jsonl", "{\n", "a.jsonl: line 1 is not JSON"),
        ("a.xlsx", "", r"a.xlsx: must be .csv, .jsonl or .txt"),
        ("a.csv.gz", "not gzip", "a.csv.gz: cannot be read"),
    ],
)
def test_an_input_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(rows_of_file(tmp_path / name, "text", format_of(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.csv.gz"])
def test_what_is_no_text_in_utf8_is_named_as_such_whatever_it_is_called(tmp_path, name):
    path = tmp_path / name
    for content, message in (
        ("text\na day\n".encode("utf-16"), "is UTF-16 and must be UTF-8"),
        (b"PK\x03\x04...", "is a spreadsheet's own file .* save as CSV UTF-8"),
    ):
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(DataError, match=f"{name}: {message}"):
            list(rows_of_file(path, "text", format_of(path)))


@pytest.mark.parametrize("name", ["EXPORT.CSV", "export.Csv.GZ"])
def test_the_end_of_a_name_may_be_in_capitals(tmp_path, name):
    path, content = tmp_path / name, b"text\na day\n"
    path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert list(rows_of_file(path, "text", format_of(path))) == [{"text": "a day"}]


def test_jsonl_stays_jsonl_and_loses_no_column(shell, workplace, tmp_path):
    given = [{"text": "a good film.", "label": "routine"}, {"id": 2, "text": "an awful day"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    out = tmp_path / "out.jsonl"
    run = workplace / "runs" / "tickets-1"
    code, _, err = shell("predict", run, tmp_path / "in.jsonl", "--client", "north", "--output", out)
    assert code == 0
    assert "on 1 rows" in err
    for row, written in zip(given, map(json.loads, out.read_text().splitlines()), strict=True):
        assert written.pop("predicted") in ("routine", "urgent")
        assert 0.5 <= written.pop("probability") <= 1
        assert written == row


def test_an_output_is_whole_or_not_there(shell, workplace, tmp_path):
    run, out = workplace / "runs" / "tickets-1", tmp_path / "out.csv"
    (tmp_path / "in.csv").write_text("text\n" + "fine\n" * 70 + '"a",b\n')
    code, _, err = shell("predict", run, tmp_path / "in.csv", "--client", "north", "--output", out)
    assert code == 2
    assert "line 72 has more fields than the header" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
    code, _, err = shell("predict", run, "--client", "north", "--output", tmp_path / "none" / "out.csv", stdin="x\n")
    assert code == 2
    assert "there is no folder" in err


def test_who_is_meant_must_be_said(shell, workplace):
    run = workplace / "runs" / "tickets-1"
    code, _, err = shell("predict", run, stdin="x\n")
    assert code == 2
    assert "--client NAME with one of north, south" in err
    code, _, err = shell("predict", run, "--client", "east", stdin="x\n")
    assert code == 2
    assert "has no client 'east'; its clients are: north, south" in err


def test_text_is_generated_to_a_label(shell, workplace, tmp_path):
    run, cache = workplace / "runs" / "tickets-1", ("--cache-dir", workplace / "cache")
    code, out, err = shell("generate", run, "--label", "urgent", "-n", 5, *cache)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    prompts = crosslm.load(run / "config.toml").task.prompt["urgent"]
    assert [row["label"] for row in rows] == ["urgent"] * 5
    assert {row["prompt"] for row in rows} <= set(prompts)
    assert all(row["text"] for row in rows)
    assert "generate: label urgent (5 texts)" in err

    # the same seed, the same texts; another seed, others
    again = tmp_path / "again.txt"
    code, out, _ = shell("generate", run, "--label", "urgent", "-n", 5, "--format", "text", "--output", again, *cache)
    assert (code, out) == (0, "")
    assert again.read_text().splitlines() == [row["text"] for row in rows]
    code, _, err = shell("generate", run, "--output", again, *cache)
    assert code == 2
    assert "is there already and nothing is written over" in err
    code, out, _ = shell("generate", run, "--label", "urgent", "-n", 5, "--seed", 1, "--format", "csv", *cache)
    assert [row["text"] for row in table(out)] != [row["text"] for row in rows]


def test_labels_are_drawn_when_none_is_given(finished):
    texts = finished.generate(12)
    assert {text.label for text in texts} == {0, 1}
    prompts = finished.config.task.prompt
    assert all(text.prompt in prompts[finished.task.labels[text.label]] for text in texts)


def test_what_cannot_be_generated_is_refused(finished):
    with pytest.raises(ConfigError, match="no label 'late'; its labels are: routine, urgent"):
        finished.generate(1, "late")
    with pytest.raises(ConfigError, match="must be 1 or more, found 0"):
        finished.generate(0)


def test_the_adapter_opens_with_peft(finished):
    base = AutoModelForCausalLM.from_pretrained(finished.original_llm())
    adapted = PeftModel.from_pretrained(base, finished.llm_folder)
    ours = finished.llm().model.state_dict()
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, ours[name])


def test_every_synthetic_text_says_where_it_comes_from(finished):
    rows = finished.synthetic()
    counts = {}
    for row in rows:
        counts[row["source"], row["step"]] = counts.get((row["source"], row["step"]), 0) + 1
    assert counts == {
        ("base", None): 6, ("final", None): 4,
        ("drafts", 1): 4, ("pool", 1): 6, ("drafts", 2): 4, ("pool", 2): 6, ("closing", None): 6,
    }  # fmt: skip
    assert {row["client"] for row in rows if row["step"]} == {"north", "south"}
    assert all(row["client"] is None for row in rows if not row["step"])


def test_a_damaged_classifier_is_named(workplace, tmp_path, finished):
    import shutil

    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "slm" / "north" / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ModelError, match=r"slm/north: a classifier cannot be loaded"):
        Run.open(tmp_path / "run").slm("north")
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path)


def test_rows_that_cannot_be_written_are_told_with_the_file(tmp_path):
    """Its folder has gone since it was looked for; a full disk is told in the same way."""
    path = tmp_path / "gone" / "rows.csv"
    with pytest.raises(RunError, match=f"{path}: cannot be written: No such file .*, or name another --output"):
        write_rows([{"text": "a good day"}], RowFormat.csv, path)
