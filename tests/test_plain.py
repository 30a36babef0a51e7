"""What another machine says is shown as words, and nothing of it is obeyed by a terminal."""

import io

import pytest
from rich.console import Console

from crosslm.federation.silo_news import closing_outcome, doing, outcome
from crosslm.runs.report import uploads_table, waited_for
from crosslm.runs.watch import sentence
from crosslm.support.plain import plain, plain_lines

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
