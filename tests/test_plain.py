"""What another machine says is shown as words, and nothing of it is obeyed by a terminal."""

import ast
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from crosslm.cli import app
from crosslm.cli import display as display_module
from crosslm.cli.display import BarDisplay, PlainDisplay
from crosslm.federation.silo_news import closing_outcome, doing, outcome
from crosslm.runs.report import label_table, uploads_table, waited_for
from crosslm.runs.rundir import RunDir
from crosslm.runs.watch import sentence
from crosslm.support.commands import command, in_shell
from crosslm.support.plain import plain, plain_lines

SOURCE = Path(__file__).parents[1] / "src" / "crosslm"
HOSTILE = {
    "clears the screen": ("sent \x1b[2Jthere", "sent  [2Jthere"),
    "names the window": ("sent \x1b]0;root\x07there", "sent  ]0;root there"),
    "begins in one byte": ("sent \x9b31mthere", "sent  31mthere"),
    "turns the writing round": ("sent \u202ethere", "sent  there"),
    "begins a line of its own": ("sent\r\nthere", "sent  there"),
}


@pytest.fixture(params=HOSTILE)
def said(request):
    return HOSTILE[request.param]


def test_what_is_not_printable_becomes_a_space(said):
    words, expected = said
    assert plain(words) == expected
    assert plain("Zürich, 東京 – [bold]") == "Zürich, 東京 – [bold]"
    assert plain_lines("one\x1b\ntwo") == "one \ntwo"


def test_the_news_of_a_run_are_plain(said):
    words, expected = said
    for event in (
        {"event": "warning", "message": words},
        {"event": "failure", "client": "north", "error": words},
        {"event": "gate", "client": "north", "passed": False, "reason": words},
        {"event": "end", "error": words},
    ):
        assert expected in sentence(event), event


def test_the_news_of_a_silo_are_plain(said):
    words, expected = said
    assert expected in doing({"now": "refused", "why": words}, "1 s")
    for found in (outcome({"not_used": words}), outcome({"refused": words}), closing_outcome({"refused": words})):
        assert expected in found


def test_the_tables_of_a_run_are_plain(said):
    words, expected = said
    assert waited_for({"not_uploaded": {"late": words}}) == [f"late never uploaded ({expected})."]
    arrival = {"silo": "late", "round": 0, "state": "refused", "note": words}
    arrival |= dict.fromkeys(("received_at", "served_at", "delivered_at"))
    shown = io.StringIO()
    Console(file=shown, width=200).print(uploads_table({"arrivals": [arrival]}))
    assert f"refused: {expected}" in shown.getvalue()


@pytest.mark.parametrize("names", [["[neg]", "[pos]"], ["[/a]", "[/pos]"], [":smile:", ":x:"]])
def test_a_label_is_shown_as_it_is_written(names):
    """And not as rich's markup, which hides [neg] and takes [/pos] for an error."""
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None, emoji=app.console._emoji)
    confusion = {"standalone": {"n": [[3, 1], [1, 3]]}, "crosslm": {"n": [[4, 0], [3, 1]]}}
    console.print(label_table({"confusion": confusion, "clients": {"n": {"rows": dict.fromkeys(names, 4)}}}))
    assert f"{names[1]}: 0.250 of 4" in out.getvalue()
    display = BarDisplay(console)
    with display.stage(f"generate: label {names[0]}", 2, "texts") as advance:
        advance(2)
    display.note(f"about {names[0]}")
    assert f"generate: label {names[0]} " in out.getvalue()
    assert f"about {names[0]}" in out.getvalue()


PRINTS = [
    pytest.param(node, id=f"{path.relative_to(SOURCE)}:{node.lineno}")
    for path in sorted(SOURCE.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and (node.func.attr == "print" or node.func.attr == "add_row")
]


@pytest.mark.parametrize("call", PRINTS)
def test_names_and_paths_are_no_markup_where_they_are_shown(call):
    """What a table's cell or a line has of somebody else's is a Text, or the line is printed without markup."""
    if call.func.attr == "print":
        words = [each for each in call.args if isinstance(each, ast.JoinedStr)]
        words += [each for each in call.args if isinstance(each, ast.Name) and each.id in ("message", "told", "words")]
        assert not words or any(keyword.arg == "markup" for keyword in call.keywords), ast.unparse(call)
    else:
        assert ast.unparse(call.args[0]) not in ("client", "silo", "name", "label"), ast.unparse(call)


def test_plain_lines_tell_rate_and_time_left(monkeypatch):
    now, seen = [100.0], io.StringIO()
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    display = PlainDisplay(Console(file=seen, width=40))
    with display.stage("generate: north [good]", 300, "texts") as advance:
        for seconds, done in ((10, 20), (10, 20), (10, 20), (20, 100)):
            now[0] += seconds
            advance(done)
        now[0] += 14
        advance(100)  # it is not yet time
    assert seen.getvalue().splitlines() == [
        "generate: north [good] (300 texts)",
        "  generate: north [good]: 40/300 texts, 2.0/s, 130 s left",
        "  generate: north [good]: 160/300 texts, 3.2/s, 44 s left",
        "  done in 64.0 s",
    ]


def test_a_command_in_a_message_can_be_pasted():
    folder = Path("my run") / "x 1"
    assert RunDir(folder).resuming() == "crosslm run 'my run/x 1/config.toml' --output 'my run/x 1' --resume"
    assert RunDir(Path("runs/x-1")).resuming() == "crosslm run runs/x-1/config.toml --output runs/x-1 --resume"
    assert command("doctor", Path("it's/tickets.toml")) == """crosslm doctor 'it'"'"'s/tickets.toml'"""
    assert in_shell("--verbalizer", "Tr\u00e8s urgent=WORD") == "--verbalizer 'Tr\u00e8s urgent=WORD'"


def test_no_message_has_a_path_in_a_command_as_it_is():
    for path in SOURCE.rglob("*.py"):
        commands = "run|doctor|report|watch|status|evaluate|server|client"
        found = re.findall(rf"crosslm (?:{commands}) {{.*|--(?:output|verbalizer) {{.*", path.read_text())
        assert not found, (path, found)
