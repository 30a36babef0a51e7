"""What a silo, a disk or a second process may do to a server between machines, and what it then does."""

import numpy as np
import pytest
from test_federation import echo, exchange, federated, flower_run, kits, turn  # noqa: F401  fixtures too

from crosslm.errors import RunError, UploadError
from crosslm.federation import spool as spool_module
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.spool import Spool

# Flower, after our package has told it to be quiet
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # isort: skip


# -- replies that are none -------------------------------------------------------------------


def ok(**more):
    return {"reply": ConfigRecord({"status": "ok"}), **more}


def array(data, dtype="uint8", stype="numpy.ndarray"):
    return ArrayRecord({"000000": Array(dtype, (3,), stype, data)})


BROKEN = {
    "nothing": ({}, "has no ConfigRecord 'reply'"),
    "a reply of another kind": ({"reply": MetricRecord({"status": 1})}, "has no ConfigRecord 'reply'"),
    "no status": ({"reply": ConfigRecord({"round": 0})}, "has the status 'None'"),
    "another status": ({"reply": ConfigRecord({"status": "fine"})}, "has the status 'fine'"),
    "a status that is no word": ({"reply": ConfigRecord({"status": 1.0})}, "has the status '1.0'"),
    "a refusal without a reason": ({"reply": ConfigRecord({"status": "refused"})}, "no reason given"),
    "no message": (ok(), "has no ArrayRecord 'message'"),
    "a message of another kind": (ok(message=ConfigRecord({"a": 1})), "has no ArrayRecord 'message'"),
    "an array that is none": (ok(message=array(b"garbage")), "its array '000000' cannot be read: ValueError"),
    "an array of objects": (ok(message=array(b"\x80\x04.")), "its array '000000' cannot be read"),
    "an array kept in another way": (ok(message=array(b"", stype="pickle")), "cannot be read: TypeError"),
    "an array of floats": (ok(message=ArrayRecord([np.full(3, np.nan)])), "of float64 in 1 dimensions"),
    "a table": (ok(message=ArrayRecord([np.zeros((2, 2), np.uint8)])), "of uint8 in 2 dimensions"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_reply_that_is_none_is_that_silos_failure_and_the_others_are_served(exchange, what):  # noqa: F811
    content, reason = BROKEN[what]
    told = []
    exchange.on_failure = lambda *given: told.append(given)
    exchange.grid.handlers["silo-0"] = lambda message: Message(RecordDict(content), reply_to=message)
    turn(exchange, 3)
    line = exchange._lines["silo-0"]
    assert line.over
    assert reason in line.note
    assert exchange.spool.of("silo-0") == []
    exchange.send(echo(exchange.receive()))
    turn(exchange, 2)
    assert [(arrival.silo, arrival.state) for arrival in exchange.spool.arrivals()] == [("silo-1", "delivered")]
    assert exchange.finished()
    ((silo, words),) = told
    assert silo == "silo-0"
    assert words == f"round 0: {line.note}"
    assert exchange.grid.pushed.count(("silo-0", "train.upload", 0)) == 1
    assert not list(exchange.spool.folder.glob("*part*"))


def test_a_message_that_flower_cannot_put_together_is_its_silos_failure_too(exchange, monkeypatch):  # noqa: F811
    import httpx

    pull, errors = exchange.grid.pull_messages, [httpx.ConnectError("no SuperLink"), ValueError("no such object")]

    def pulled(ids):
        if ids == ["1"]:
            raise errors[0]
        return pull(ids)

    monkeypatch.setattr(exchange.grid, "pull_messages", pulled)
    with pytest.raises(httpx.ConnectError):  # that is no fault of a silo's
        turn(exchange, 2)
    assert not exchange._lines["silo-0"].over
    errors.pop(0)
    turn(exchange, 2)
    assert "cannot be put together: ValueError: no such object" in exchange._lines["silo-0"].note
    assert exchange.receive().client_id == "silo-1"


def test_an_install_that_is_answered_with_nonsense_is_owed_no_more(exchange):  # noqa: F811
    exchange.grid.online = ["silo-0"]
    turn(exchange, 2)
    exchange.send(echo(exchange.receive()))
    exchange.grid.handlers["silo-0"] = lambda message: Message(RecordDict(), reply_to=message)
    turn(exchange, 4)
    (arrival,) = exchange.spool.arrivals()
    assert arrival.state == "delivered"
    assert arrival.note.startswith("the silo did not take it: its reply has no ConfigRecord")
    assert exchange.grid.pushed.count(("silo-0", "train.install", 0)) == 1


# -- bounds ----------------------------------------------------------------------------------


def test_an_upload_that_is_too_large_is_cut_off_and_the_next_one_taken(exchange):  # noqa: F811
    most = 10 * 2**20
    exchange.intake = type(exchange.intake)(
        exchange.intake.labels, exchange.intake.bounds.model_copy(update={"max_bytes": most})
    )
    large = split(bytes(2 * most))
    exchange.grid.handlers["silo-0"] = lambda message: Message(RecordDict(ok(message=large)), reply_to=message)
    turn(exchange, 3)
    assert f"more than {most} bytes; no more are allowed (intake.max_bytes)" in exchange._lines["silo-0"].note
    assert [arrival.silo for arrival in exchange.spool.arrivals()] == ["silo-1"]
    assert not list(exchange.spool.folder.glob("silo-0*"))
    assert exchange.receive().client_id == "silo-1"


def test_bytes_are_counted_before_more_of_them_are_read():
    arrays = split(bytes(40 * 2**20))
    with pytest.raises(UploadError, match=r"more than 17 bytes; no more are allowed \(intake.max_bytes\)"):
        list(joined(arrays, 17))
    assert len(arrays) == 2  # of three
    assert sum(map(len, joined(split(bytes(17)), 17))) == 17


def test_a_file_of_the_spool_that_is_too_large_is_not_read(exchange, monkeypatch):  # noqa: F811
    turn(exchange, 2)
    bounds = exchange.intake.bounds.model_copy(update={"max_bytes": 1000})
    exchange.intake = type(exchange.intake)(exchange.intake.labels, bounds)
    monkeypatch.setattr(spool_module, "_read", lambda *_: pytest.fail("it was read"))
    assert exchange.receive() is None
    first = exchange.spool.of("silo-0")[0]
    assert first.state == "refused"
    assert "at most 1000 are allowed (intake.max_bytes)" in first.note


# -- a full disk -----------------------------------------------------------------------------


def test_a_full_disk_is_told_with_its_file_and_what_to_do(exchange, monkeypatch):  # noqa: F811
    """And ends the server: to start again does not help."""

    def full(path, parts):
        list(parts)
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "write_whole", full)
        exchange.start()
        exchange._thread.join(10)
        with pytest.raises(RunError, match=r"silo-0-0000-up\.part: cannot be written: No space left.*make room"):
            exchange.finished()
        with pytest.raises(RunError, match="crosslm server"):
            exchange.spool.serve("silo-0", 0, b"download")
    assert exchange.spool.arrivals() == []
    assert exchange.spool.put("silo-0", 0, [b"whole"])  # and with room again it is taken


def test_a_journal_that_cannot_be_written_is_named(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool._database.execute("PRAGMA max_page_count = 6")  # as good as a full disk
    with pytest.raises(RunError, match=r"journal\.sqlite: cannot be written: .*full.*make room"):
        spool.note("large", "x" * 10**6)
    spool.close()
