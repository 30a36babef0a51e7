"""The HTML report: its intervals, its warnings, and that untrusted text stays text."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_run import HOSTILE, write_run, write_run_between_machines
from rich.console import Console

from crosslm.algorithm.per_label import macro_f1, recalls
from crosslm.cli import main as cli
from crosslm.errors import RunError
from crosslm.html_report.collect import Arrival, RunView, Sample, representative, selection_reasons
from crosslm.html_report.findings import findings
from crosslm.html_report.intervals import binomial_interval, paired_gain_interval
from crosslm.html_report.page import all_differences, compared, differences, gain_interval, number, render
from crosslm.html_report.verdict import verdicts
from crosslm.runs.report import closing
from crosslm.runs.rundir import RunDir

ROOT = Path(__file__).parents[1]


def view_of(folder):
    return RunView.read(RunDir.open(folder))


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The page of a run."""
    return render([view_of(write_run(tmp_path_factory.mktemp("runs") / "run"))])


@pytest.fixture
def no_charts(monkeypatch):
    """As on a machine without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class Text(HTMLParser):
    """The tags of a page, and the text of its cells."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action"):
                self.links.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_wilsons_interval_of_eight_in_ten():
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 0.8, n = 10, z = 1.95996
    low, high = binomial_interval(0.8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


def test_a_gain_on_every_row_has_no_width_and_none_where_nothing_changed():
    assert paired_gain_interval([[False] * 9], [[True] * 9], [0]) == (1.0, 1.0)
    assert paired_gain_interval([[True, False]], [[True, False]], [0]) == (0.0, 0.0)


def test_the_paired_interval_is_that_of_the_mean_change():
    before, after = [False] * 40 + [True] * 60, [True] * 60 + [False] * 10 + [True] * 30
    low, high = paired_gain_interval([before], [after], [0])
    # 40 rows gained, 10 lost: mean 0.30, standard error sqrt((0.5 - 0.09) / 100) = 0.064
    assert low == pytest.approx(0.30 - 1.96 * 0.064, abs=0.02)
    assert high == pytest.approx(0.30 + 1.96 * 0.064, abs=0.02)


def test_clients_on_the_same_rows_share_a_draw():
    before, after = [False] * 50 + [True] * 50, [True] * 100
    same = paired_gain_interval([before] * 4, [after] * 4, [0, 0, 0, 0])
    other = paired_gain_interval([before] * 4, [after] * 4, [0, 1, 2, 3])
    assert same == paired_gain_interval([before], [after], [0])
    assert other[1] - other[0] == pytest.approx((same[1] - same[0]) / 2, rel=0.2)  # four times the rows


def test_each_label_by_hand():
    counts = [[6, 2, 0], [1, 3, 0], [0, 0, 0]]  # of 8 rows 6 are found, of 4 rows 3; the last label has none
    assert recalls(counts) == [0.75, 0.75, None]
    # F1 = 2 * 6 / (8 + 7) = 0.8 and 2 * 3 / (4 + 5) = 2/3; the third label counts for nothing
    assert macro_f1(counts) == pytest.approx((0.8 + 2 / 3) / 2)
    assert macro_f1([[0, 0], [0, 0]]) is None


def test_what_the_gains_come_to_is_said_in_words(tmp_path):
    worse = {"event": "test", "method": "crosslm", "client": "south", "rows": 0, "right": "1" * 50 + "0" * 50}
    same = {"event": "test", "method": "crosslm", "client": "west", "rows": 0, "right": "1" * 59 + "0" * 40 + "1"}
    arrivals = (("north", 0.5, 0.9), ("south", 0.4, 0.9), ("west", 0.4, 0.9))
    folder = write_run(tmp_path / "run", arrivals, [worse, same])
    summary = json.loads((folder / "summary.json").read_text())
    summary["slm"]["crosslm"] |= {"south": 0.5, "west": 0.6, "mean": 1.9 / 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    north, south, west, mean, kd, last = verdicts(view_of(folder))
    assert north.startswith("north: better, +20.0 points [+1")
    assert south.startswith("south: worse, -10.0 points [-1")
    assert south.endswith("Its own was right more often; to use that: crosslm predict RUN --client south --own.")
    assert west.startswith("west: no clear change, +0.0 points [-")
    assert not west.endswith("--own.")
    assert mean.startswith("Mean of the clients: no clear change, +3.3 points [-")
    assert kd.startswith("What the LLM learned of the clients brought less: -6.7 points [-")
    assert "over Data-free KD, whose LLM learned nothing" in kd
    assert "another seed may move a figure more" in last
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config + "[federation]\nparticipations = 2\n")
    assert not any("--own" in line for line in verdicts(view_of(folder)))  # what was uploaded last has no figure
    (folder / "config.toml").write_text(config)
    (folder / "summary.json").write_text(json.dumps(summary | {"arrivals": []}))
    assert not any("--own" in line for line in verdicts(view_of(folder)))  # it is at the silo
    console = Console(file=io.StringIO(), width=200)
    console.print(closing(summary, [north, south]))
    told = console.file.getvalue()
    assert north in told
    assert re.search(r"north *│ *0\.\d+ │ *0\.\d+ │ routine: 0\.820 of 50|north *│ .* urgent: 0\.780 of 50", told)


def test_an_llm_that_knows_no_labels_is_warned_of(tmp_path):
    folder = write_run(tmp_path / "run", (("north", -0.2, 0.9), ("south", 0.4, 0.9)))
    summary = json.loads((folder / "summary.json").read_text())
    summary["llm"]["nlu_accuracy"]["after"] = 0.54
    (folder / "summary.json").write_text(json.dumps(summary))
    chance, low = findings(view_of(folder))
    assert chance.title == "the LLM does not tell the labels apart"
    assert "classifies 0.540 of the test text right, and 0.500 is chance" in chance.text
    assert (low.title, "north -0.20)" in low.text) == ("mean reward below chance", True)
    four = (folder / "config.toml").read_text().replace('["routine", "urgent"]', '["routine", "urgent", "c", "d"]')
    (folder / "config.toml").write_text(four)
    (folder / "summary.json").write_text(json.dumps(summary | {"confusion": {}}))  # that is of two labels
    assert not findings(view_of(folder))  # of four labels a guess has a mean reward of -0.5, and is right on 0.25


def row(label, reward, kept):
    return {"label": label, "reward": reward, "kept": kept}


def test_why_a_text_was_kept_or_not():
    rows = [row("a", 0.9, True), row("a", 0.8, False), row("b", 0.5, True), row("b", -0.2, False)]
    assert selection_reasons(rows, {"class_balance": True, "nonpositive_rewards": "drop"}) == [
        "place 1 of a; the best 1 are taken",
        "place 2 of a; the best 1 are taken",
        "place 1 of b; the best 1 are taken",
        "reward not above 0",
    ]
    assert selection_reasons(rows[:2], {}) == ["place 1; the best 1 are taken", "place 2; the best 1 are taken"]


def test_a_large_pool_is_shown_by_its_best_kept_and_others_of_all_ranks():
    pool = [Sample(1, "a", str(rank), "x", 0, 0, 0, rank, rank <= 30, "") for rank in range(1, 101)]
    shown = representative(pool, 20)
    assert [sample.rank for sample in shown[:10]] == list(range(1, 11))
    assert [sample.rank for sample in shown[10:]] == list(range(31, 101, 7))
    assert representative(pool, 100) == pool


def test_reward_hacking_is_warned_of_where_the_run_found_it(tmp_path):
    (found,) = findings(view_of(write_run(tmp_path / "run")))
    assert found.title == "reward hacking over the whole run"
    assert "rose from +0.20 to +0.50" in found.text
    assert "fell from 0.900 to 0.700" in found.text
    second = {"reward_hacking": {"arrivals": [2], "whole_run": False}}
    (found,) = findings(view_of(write_run(tmp_path / "another", **second)))
    assert found.title == "reward hacking is likely"
    assert "In arrival 2 the mean reward rose from +0.40 before the LLM's update to +0.50 after it" in found.text
    assert "please the SLM of south" in found.text
    unjudged, none = (
        view_of(write_run(tmp_path / name, reward_hacking=found))
        for name, found in (("no-judge", None), ("no-hacking", {"arrivals": [], "whole_run": False}))
    )
    assert findings(unjudged) == findings(none) == []
    assert "Reward hacking was not looked for, since there was no independent judge." in render([unjudged])
    assert "no sign of reward hacking" not in render([unjudged])
    assert "no sign of reward hacking" in render([none])


def test_a_run_between_machines_is_shown_without_the_accuracies_that_nobody_knows(tmp_path):
    view = view_of(write_run_between_machines(tmp_path / "run"))
    assert "reward hacking" not in " ".join(finding.title for finding in findings(view))
    page = render([view])
    assert "Who uploaded when" in page
    assert "was asked at 12:04" in page


@pytest.mark.parametrize(
    "arrivals",
    [
        (("north", 0.5, 0.90), ("south", 0.2, 0.70)),  # both fall: the texts got worse, and the SLM says so
        (("north", 0.2, 0.70), ("south", 0.5, 0.90)),  # both rise
        (("north", 0.2, 0.71), ("south", 0.5, 0.70)),  # within the noise of 400 texts
    ],
)
def test_other_changes_are_no_reward_hacking(tmp_path, arrivals):
    assert findings(view_of(write_run(tmp_path / "run", arrivals))) == []


def test_failures_one_class_and_lost_accuracy_are_told(tmp_path):
    extra = [
        {"event": "failure", "client": "west", "error": "MemoryError: full"},
        {"event": "gate", "client": "east", "passed": False, "reason": "agrees with nobody"},
        {"event": "warning", "message": "only 3 of 50 texts could be selected"},
        {"event": "test", "method": "crosslm", "client": "south", "rows": 0, "right": "0" * 100},
    ]
    folder = write_run(tmp_path / "run", (("north", 0.5, 0.9), ("south", 0.4, 0.9)), extra)
    summary = json.loads((folder / "summary.json").read_text())
    summary["clients"]["north"]["rows"]["urgent"] = 0
    summary["llm"]["distinct_2"]["after"] = 0.3
    summary["clients"]["north"]["decision"] = {"accepted": False, "rows": 20, "before": 0.9, "after": 0.5}
    summary["clients"]["north"]["decision"]["balanced"] = True
    summary["clients"]["south"]["decision"] = {"accepted": True, "rows": 20, "before": 0.5, "after": 0.9}
    (folder / "summary.json").write_text(json.dumps(summary))
    found = findings(view_of(folder))
    assert [finding.title for finding in found] == [
        "client west failed",
        "the upload of client east was quarantined",
        "client north has one class only",
        "client north did not accept what came back",
        "client south lost accuracy",
        "the LLM repeats itself more",
        "noted during the run",
    ]
    assert found[0].text == "MemoryError: full"
    console = Console(file=io.StringIO(), width=200)
    summary["clients"]["west"] = summary["clients"]["north"] | {"decision": None}
    console.print(closing(summary))
    del summary["clients"]["west"]
    assert "west is in no figure of CrossLM: it was not served; crosslm status RUN says why." in console.file.getvalue()
    (told,) = [line for line in console.file.getvalue().splitlines() if "did not accept" in line]
    assert told.startswith(
        "north did not accept what came back. It was right on 0.500 of 20 held-out private rows, each"
    )
    summary["privacy"] = {"north": {"epsilon": 8.0, "delta": 1e-5, "count_epsilon": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert not any("one class" in finding.title for finding in findings(view_of(folder)))  # the 0 may be noise


def test_a_classifier_with_one_answer_and_few_test_rows_are_told(tmp_path):
    folder = write_run(tmp_path / "run", (("north", 0.5, 0.9), ("south", 0.4, 0.9)))
    summary = json.loads((folder / "summary.json").read_text())
    summary["confusion"]["crosslm"] = {"north": [[0, 12], [0, 12]], "south": [[12, 0], [0, 12]]}
    summary["test_rows"] = {"north": 24, "south": 100}
    (folder / "summary.json").write_text(json.dumps(summary))
    one, few = findings(view_of(folder))
    assert one.title == "the classifier of north has one answer only"
    assert "'urgent' in every test row" in one.text
    assert few.text.startswith("north: on 24 rows one row is 4.2 points")


def test_figures_that_say_nothing_are_not_shown():
    assert [number(value, 3, "+") for value in (-0.0004, 0.0, 0.0006, -0.0006)] == [
        "0.000",
        "0.000",
        "+0.001",
        "−0.001",
    ]
    assert number(None) == "–"
    assert gain_interval((0.0, 0.0)) == "same rows right"
    assert gain_interval((-0.1, 0.0)) == "−0.100 to 0.000"


def test_updates_are_whole_and_a_small_loss_has_no_factor_beside_its_axis():
    plots = pytest.importorskip("crosslm.html_report.plots", exc_type=ImportError)
    arrivals = [Arrival(1, "a", {}, [{"loss": 0.0}]), Arrival(2, "b", {}, [{"loss": 7.7e-8}])]
    ticks = set(re.findall(r">([^<>]+)</text>", plots.update_chart(arrivals, "t", {"loss": "all"}).svg))
    assert {"1", "2"} <= ticks
    assert not ticks & {"1.2", "1.5", "0.6", "1e−8", "1e-8"}
    assert any(tick.endswith("e−08") for tick in ticks)


def test_the_page_needs_nothing_from_elsewhere_and_holds_everything(html):
    read = Text(html)
    assert len(read.ids) == len(set(read.ids))
    assert [link for link in read.links if not link.startswith("#")] == []
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert "@import" not in html
    text = " ".join(" ".join(read.text).split())
    for words in (
        "0.800 0.711 to 0.867",  # Wilson: 80 of 100
        "+0.200 +0.120 to +0.280",  # paired bootstrap: 20 of 100 rows gained
        "north: send somebody",
        "place 1 of urgent; the best 1 are taken",
        "reward not above 0",
        "head.weight 2 × 32 torch.float32 256",
        "class_balance = true",
        "torch 2.13.0",
        "texts removed, empty 3",
    ):
        assert words in text, words
    assert read.tags.count("figure") == 7
    assert re.search(r"<td[^>]*>\s*41</td>", html)


def test_what_the_llm_wrote_stays_text(html):
    read = Text(html)
    assert HOSTILE in read.text
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    # and if it did not: the page allows its own script only
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_an_older_run_shows_what_it_has(tmp_path, no_charts):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["confusion"], summary["nlu_rows"]
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"event": "test"' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = render([view_of(folder)])
    assert "This run did not keep which rows were right" in html
    assert "made by an earlier version" in html
    assert 'class="matrix"' not in html


def test_without_matplotlib_the_page_says_how_to_get_charts(tmp_path, no_charts):
    html = render([view_of(write_run(tmp_path / "run"))])
    assert "pip install 'crosslm[report]'" in html
    assert "<figure" not in html


def test_two_runs_side_by_side(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", (("north", 0.1, 0.5),))
    (second / "config.toml").write_text((second / "config.toml").read_text().replace("seed = 7", "seed = 8"))
    html = render([view_of(first), view_of(second)])
    read = Text(html)
    assert len(read.ids) == len(set(read.ids))
    assert "seed 7 8" in " ".join(" ".join(read.text).split())
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        ("a.c", "2", "3"),
        ("d", "not set", "4"),
    ]
    assert differences({"a": False, "b": "x"}, {"a": True, "b": ["ü"]}) == [("a", "false", "true"), ("b", "x", '["ü"]')]


def test_runs_of_different_clients_are_compared_on_those_that_both_have(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", (("north", 0.2, 0.90),))
    summary = json.loads((one / "summary.json").read_text())
    summary["slm"]["crosslm"] |= {"north": 0.75, "mean": 0.775}
    (one / "summary.json").write_text(json.dumps(summary))
    (two / "rollback.json").write_text(json.dumps({"clients": ["south"], "of": ["one"]}))
    views = [view_of(folder) for folder in (one, two)]
    assert [row[0] for row in compared(*views)] == ["north", "south", "mean of north"]
    assert [cell[0] for cell in compared(*views)[-1][1:]] == [0.75, 0.8]
    assert all_differences(*views) == [("rolled back without", "nobody", "south")]
    page = " ".join(" ".join(Text(render(views)).text).split())
    assert "mean of north 0.750 0.800 +0.050" in page


def test_the_command_writes_beside_the_run(tmp_path, monkeypatch, capsys, no_charts):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    monkeypatch.setattr("sys.argv", ["crosslm", "report", str(first), str(second)])
    cli.app(standalone_mode=False)
    assert (first / "compare-with-b.html").is_file()
    assert str(first / "compare-with-b.html") in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "synthetic/step-0001-pool.jsonl"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text('{"event"\n')
    with pytest.raises(RunError, match=f"{name}: damaged"):
        view_of(folder)


@pytest.mark.parametrize(("number", "first"), [(errno.EROFS, "make it writable"), (errno.ENOSPC, "make room there")])
def test_a_page_that_cannot_be_written_is_told_with_what_helps(tmp_path, monkeypatch, shell, number, first):
    """There is nothing to go on with in a complete run; in one that is not there is."""

    def refused(*_):
        raise OSError(number, os.strerror(number))

    folder = write_run(tmp_path / "run")
    monkeypatch.setattr("crosslm.runs.rundir.write_whole", refused)
    code, _, err = shell("report", folder)
    said = f"cannot be written: {os.strerror(number)}; {first}, and give the same command again"
    assert (code, err) == (2, f"error: {folder / 'report.html'}: {said}\n")
    (folder / "summary.json").unlink()
    with pytest.raises(RunError, match=f"{said}, crosslm run with --resume"):
        RunDir(folder).write("slm.txt", "")


def test_a_private_run_shows_its_bound_and_hides_what_was_hidden(tmp_path):
    bound = {"epsilon": 7.99, "delta": 1e-5, "noise_multiplier": 4.28}
    upload = {
        "event": "upload",
        "client_id": "west",
        "client_round": 0,
        "class_counts": [0, 0],
        "metrics": {"loss": 0.12345, **{f"dp/{name}": value for name, value in bound.items()}},
        "tensors": {},
        "bytes": 10,
    }
    folder = write_run(tmp_path / "run", extra=[upload], privacy={"north": bound})
    summary = json.loads((folder / "summary.json").read_text())
    summary["clients"]["south"]["rows"] = {"routine": 0, "urgent": 0}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = " ".join("".join(Text(render([view_of(folder)])).text).split())
    assert "figures: loss 0.1235, dp/epsilon 7.99, dp/delta 1e-05, dp/noise_multiplier 4.28" in text
    assert "rows of each label: hidden" in text
    assert "private rows: routine 90, urgent 110." in text
    assert "private rows: hidden." in text
    assert "epsilon of all uploads together north 7.99 (delta 1e-05); exact class counts are outside it;" in text
    assert "; no bound for south." in text


@pytest.mark.parametrize(
    ("required", "code", "words"), [(True, 1, "no Chromium on the PATH: install"), (False, 0, "skipped")]
)
def test_without_a_browser_make_test_report_fails_and_make_test_skips(tmp_path, required, code, words):
    pytest.importorskip("axe_playwright_python")
    (recipe,) = re.findall(r"^\t(.*test_report_browser\.py.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    (setting,) = re.findall(r"^(\w+=1) ", recipe)
    name, _, value = setting.partition("=")
    environment = {key: kept for key, kept in os.environ.items() if key != name} | {"PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-k", "axe", "-x", "-rs"]
    done = subprocess.run(
        [*command, "tests/test_report_browser.py"],
        cwd=ROOT,
        env=environment | ({name: value} if required else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert words in done.stdout


def test_what_all_were_taught_in_the_end_is_shown(tmp_path, html):
    taken = {"event": "closing", "client": "north", "accepted": True, "slm/crosslm": 0.812, "slm/data_free_kd": 0.798}
    declined = {"event": "closing", "client": "south", "accepted": False, "slm/crosslm": 0.7, "slm/data_free_kd": 0.7}
    shown = render([view_of(write_run(tmp_path / "run", extra=[taken, declined]))])
    cells = " ".join(" ".join(Text(shown).text).split())
    assert "north yes 0.812 0.798" in cells
    assert "south no 0.700 0.700" in cells
    elsewhere = render([view_of(write_run(tmp_path / "blind", extra=[{"event": "closing", "client": "north"}]))])
    assert "north known at the silo" in " ".join(" ".join(Text(elsewhere).text).split())
    assert "When no more uploads came" not in html
