"""Carrying over Flower: the threads that ask silos and bring them what they are owed, and the spool between.

Flower's grid is touched by these threads alone, so uploads come in while the LLM trains. Each silo is carried for in a
thread of its own: Flower gives an answer out before its parts have come, and who asks for it waits for these, for
minutes where a silo's line is slow or its process has died. What Flower does not do and this does: ask again when a
node was away or a message was lost, wait longer each time, and count a reply once however often it comes.
"""

import logging
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from crosslm import __version__
from crosslm.config import FederationConfig
from crosslm.errors import FederationError, ShortageError, UploadError
from crosslm.federation import messages
from crosslm.federation.arrivals_journal import Arrival
from crosslm.federation.flower.payload import joined, split
from crosslm.federation.flower.replies import Answer, answer_in, pulled
from crosslm.federation.spool import Spool
from crosslm.support.plain import plain

POLL = 0.5  # seconds after which each thread looks again, if the other has not woken it
LONGEST_WAIT = 60.0  # seconds between two attempts at a silo that does not answer
HEARTBEAT = 5.0  # seconds
LAST_MOVES = 15.0  # seconds in the end for what is on its way
MOST_ERRORS = 5  # in a row that a silo answers with before it is said that it fails
DECLINED = "DeclinedError"  # how the answer of a silo begins that agrees to no more
AGAIN = "; asked again "  # and when
TOLD = "told/"  # and silo and round: the words that stand for the reason of a refusal
logger = logging.getLogger(__name__)


@dataclass
class Line:
    """What goes on with one silo: at most one open message."""

    silo: str
    open_message: str | None = None
    kind: str = ""
    round: int = 0
    asked_at: float = 0.0
    attempts: int = 0
    errors: int = 0
    """Attempts in a row that ended with an error at the silo which its application did not foresee."""
    not_before: float = 0.0
    """On this machine's steady clock, as ``asked_at``: one that is set right meanwhile changes nothing."""
    fails_since: float | None = None
    """Since when it has refused to train, or to train or to install has failed, each time that it was asked."""
    over: bool = False
    """It is not asked again: what it answers is no answer, or it has agreed to no more."""
    note: str = ""
    told: set[str] = field(default_factory=set)
    """What the run knows of since it has answered last."""


class Carrier:
    """Asks every silo for its uploads and brings it its downloads, until it is stopped.

    Args:
        grid: Flower's.
        spool: filled and emptied by it.
        experiment: whose messages these are.
        silos: their names, as the server's keys say.
        config: how often and how long.
        max_bytes: that an upload may have.
    """

    def __init__(
        self, grid: Grid, spool: Spool, experiment: str, silos: list[str], config: FederationConfig, max_bytes: int
    ) -> None:
        self.grid, self.spool, self.experiment, self.config, self.max_bytes = grid, spool, experiment, config, max_bytes
        self.lines = {silo: Line(silo) for silo in silos}
        self.failed: SimpleQueue[tuple[str, str]] = SimpleQueue()
        """Silos that are asked for no more, and why."""
        self.carried = threading.Event()
        """Something was carried: who waits for an upload or a delivery looks."""
        self.to_carry = threading.Event()
        """There is something to carry."""
        self.has_ended = False
        """No upload is asked for any more."""
        self.failure: BaseException | None = None
        """What ended the carrying thread."""
        self.thread = threading.Thread(target=self._carry, name="carrier", daemon=True)
        self._stop, self._beat = threading.Event(), -HEARTBEAT
        if spool.fact("started") is None:
            spool.note("started", str(time.time()))

    def stop(self) -> None:
        """Carry no more, after a quarter of a minute at most for what is on its way."""
        self._stop.set()
        self.to_carry.set()
        if self.thread.is_alive():
            self.thread.join(timeout=2 * LAST_MOVES)

    def is_over(self) -> bool:
        """Whether nobody will be asked for an upload any more."""
        lines = list(self.lines.values())  # none where the keys cannot be read now, which may pass
        return self.is_too_late() or (bool(lines) and all(self._is_done(line) for line in lines))

    def untold(self) -> list[Arrival]:
        """Refused uploads whose silos do not know of it, and can be told."""
        refused = [arrival for arrival in self.spool.arrivals() if arrival.state == "refused"]
        return [arrival for arrival in refused if arrival.delivered_at is None and arrival.silo in self.lines]

    def _carry(self) -> None:
        moves: dict[str, Future[bool]] = {}
        try:
            while not self._stop.is_set():
                online = self.online()
                for line in list(self.lines.values()):  # a silo may be added meanwhile
                    if line.silo in moves:  # one waits for its silo
                        continue
                    if self._has_to_do(line, online):
                        moves[line.silo] = self._begin(line, online)
                    else:
                        self._note_away(line, online)
                wait(moves.values(), timeout=POLL)
                ended = [silo for silo, move in moves.items() if move.done()]
                results = [moves.pop(silo).result() for silo in ended]
                if time.monotonic() - self._beat > HEARTBEAT:
                    self._beat = time.monotonic()
                    self.spool.note("alive", str(time.time()))
                if any(results):
                    self.carried.set()
                    continue
                self.to_carry.wait(POLL)
                self.to_carry.clear()
            for move in wait(moves.values(), timeout=LAST_MOVES).done:  # what is on its way, a silo's last yes
                move.result()
        except BaseException as error:  # noqa: BLE001  raised again in the thread that trains
            self.failure = error

    def _has_to_do(self, line: Line, online: dict[str, int]) -> bool:
        """Whether a message is open, or may be sent."""
        return line.open_message is not None or (time.monotonic() >= line.not_before and line.silo in online)

    def _note_away(self, line: Line, online: dict[str, int]) -> None:
        """Say of a silo that would be asked again now, but is not connected, that it is asked when it is."""
        why, again, when = line.note.rpartition(AGAIN)
        if again and when.startswith("in ") and line.silo not in online and time.monotonic() >= line.not_before:
            line.note = f"{why}{AGAIN}when it is connected"
            self._write_line(line)

    def _begin(self, line: Line, online: dict[str, int]) -> Future[bool]:
        """Do what can be done for one silo, in a thread that this process does not wait for when it ends."""
        move: Future[bool] = Future()

        def run() -> None:
            try:
                move.set_result(self.move(line, online))
            except BaseException as error:  # noqa: BLE001  raised again where the result is looked at
                move.set_exception(error)

        threading.Thread(target=run, name=f"carrier of {line.silo}", daemon=True).start()
        return move

    def online(self) -> dict[str, int]:
        """Node ids of the silos that are connected. A silo is known by its key's name, given by the server."""
        nodes: Any = self.grid.get_nodes()
        return {node.name: node.node_id for node in nodes}

    def move(self, line: Line, online: dict[str, int]) -> bool:
        """Do what can be done for one silo now; whether something was done."""
        if line.open_message is not None:
            return self._look_for_reply(line)
        if not self._has_to_do(line, online):
            return False
        try:
            task = self._task(line)  # reads a download, which may be large: only when it can be sent
        except FederationError as error:  # the disk has lost it: the others go on, and it may be put back
            self._tell(line, str(error))
            self._later(line, str(error), LONGEST_WAIT)
            return False
        if task is None:
            return False
        kind, number, content = task
        message = Message(content, online[line.silo], f"train.{kind}", ttl=self.config.reply_minutes * 60)
        ids = list(self.grid.push_messages([message]))
        if not ids or not ids[0]:
            self._later(line, "the message could not be sent")
            return False
        line.open_message, line.kind, line.round, line.asked_at = ids[0], kind, number, time.monotonic()
        line.note = f"{kind} of round {number} asked for"
        self._write_line(line)
        return True

    def _task(self, line: Line) -> tuple[str, int, RecordDict] | None:
        """What to ask of a silo next: its upload, to install its download, or nothing for now."""
        mine = self.spool.of(line.silo)
        owed = next((arrival for arrival in mine if arrival.state == "served"), None)
        if owed is not None:
            content = self.request(owed.round)
            content["message"] = split(self.spool.download(owed))
            return "install", owed.round, content
        untold = next((arrival for arrival in self.untold() if arrival.silo == line.silo), None)
        if untold is not None:
            return "not_used", untold.round, self.request(untold.round, reason=self._told_of(untold))
        closing = self.spool.closing_of(line.silo)
        if closing is not None and self.spool.owes_closing(line.silo):
            content = self.request(closing[0])
            content["message"] = split(self.spool.closing_download(line.silo, closing[1]))
            return "closing", closing[0], content
        if self.has_ended or line.over or any(arrival.state in ("received", "processing") for arrival in mine):
            return None
        if len(mine) >= self.config.participations or self.is_too_late():
            return None
        return "upload", len(mine), self.request(len(mine))

    def request(self, number: int, reason: str = "") -> RecordDict:
        """What a message to a silo begins with: the experiment, the round, versions, and the reason of a refusal."""
        fields = {"experiment": self.experiment, "round": number, "version": messages.VERSION, "crosslm": __version__}
        return RecordDict({"request": ConfigRecord({**fields, "reason": reason} if reason else fields)})

    def _look_for_reply(self, line: Line) -> bool:
        try:
            reply = pulled(self.grid, str(line.open_message), self.max_bytes)
            if reply is None:
                if time.monotonic() - line.asked_at > self.config.reply_minutes * 60:
                    self._later(line, "no answer in time")
                return False
            if reply.has_error():
                self._count_error(line, reply.error)
                self._later(
                    line, f"{reply.error.code} {reply.error.reason}"[:200], LONGEST_WAIT if line.errors else 0.0
                )
                return True
            answer = answer_in(reply, line.kind)
            if answer.refusal is not None and line.kind == "upload" and not answer.refusal.startswith(DECLINED):
                self._may_be_mended(line, f"refused upload: {answer.refusal}")
                self._later(line, f"refused upload: {answer.refusal}")
                return True
            self._take(line, answer)
        except ShortageError as error:  # nothing is said of the reply: it is asked for again
            self._tell(line, str(error))
            self._later(line, str(error), LONGEST_WAIT)
            return False
        except UploadError as error:
            self._fail(line, "failed", str(error))
        line.open_message, line.attempts, line.errors, line.fails_since = None, 0, 0, None
        line.told.clear()
        self._write_line(line)
        return True

    def _count_error(self, line: Line, error: Error) -> None:
        """An error of a silo's own: a machine that has no room or no GPU today may have them tomorrow."""
        if error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
            line.errors += 1
            if line.errors >= MOST_ERRORS:
                self._may_be_mended(line, f"failed {line.kind}: {error.reason}"[:200] + f"; {line.errors} times")

    def _may_be_mended(self, line: Line, what: str) -> None:
        """A silo does not do it: it is asked again, since whoever runs it may see to it; told once."""
        if line.fails_since is None:
            line.fails_since = time.monotonic()
            self._tell(line, f"{what}; it is asked again")

    def _tell(self, line: Line, what: str) -> None:
        """Have the run know of something once, however often it is tried."""
        what = plain(what)
        if what not in line.told:
            line.told.add(what)
            logger.error("silo %s, round %d: %s", line.silo, line.round, what)
            self.failed.put((line.silo, f"round {line.round}: {what}"))

    def _take(self, line: Line, answer: Answer) -> None:
        if answer.agreed is not None:
            self.spool.agrees(line.silo, answer.agreed)
        if answer.refusal is not None:
            self._fail(line, "refused", answer.refusal)
        elif answer.message is not None and line.kind == "upload":
            self._received(line, answer.message)
        elif line.kind == "not_used":
            line.note = f"told that its upload of round {line.round} was not used"
            self.spool.told(line.silo, line.round)
        else:
            line.note = f"{line.kind} of round {line.round} answered"
            note = "" if answer.accepted else "the silo keeps the SLM it had: worse on its held-out rows"
            self._taken(line, note)

    def _taken(self, line: Line, note: str) -> None:
        """A silo has answered to a download, whatever it did with it."""
        if line.kind == "closing":
            self.spool.closed(line.silo, note or "delivered")
        else:
            self.spool.delivered(line.silo, line.round, note)

    def _received(self, line: Line, message: ArrayRecord) -> None:
        try:
            new = self.spool.put(line.silo, line.round, joined(message, self.max_bytes))
            line.note = "upload received" if new else "upload received again"
        except FederationError as error:
            logger.error("%s", error)
            line.note = str(error)

    def _fail(self, line: Line, how: str, reason: str) -> None:
        """A silo has refused, or what it answers cannot be used: the others go on.

        One that has refused what came back may still send its next upload.
        """
        reason = plain(reason)
        line.over = line.over or how == "failed" or line.kind == "upload"
        line.note = f"{how} {line.kind}: {reason}"
        logger.error("silo %s, round %d: %s", line.silo, line.round, line.note)
        self.failed.put((line.silo, f"round {line.round}: {line.note}"))
        if line.kind in ("install", "closing"):  # or it would be owed for ever
            self._taken(line, f"the silo did not take it: {reason}")
        if line.kind == "not_used":
            self.spool.told(line.silo, line.round)

    def _later(self, line: Line, why: str, least: float = 0.0) -> None:
        line.attempts += 1
        wait = max(least, min(LONGEST_WAIT, 2.0 ** min(line.attempts, 10)))
        line.open_message, line.not_before, line.note = (
            None,
            time.monotonic() + wait,
            f"{plain(why)}{AGAIN}in {wait:.0f} s",
        )
        logger.warning("silo %s: %s", line.silo, line.note)
        self._write_line(line)

    def _write_line(self, line: Line) -> None:
        self.spool.note(f"silo/{line.silo}", f"{time.time():.0f} {line.note}")

    def _told_of(self, refused: Arrival) -> str:
        """What a silo is told of its upload."""
        return self.spool.fact(f"{TOLD}{refused.silo}/{refused.round}") or refused.note

    def _is_done(self, line: Line) -> bool:
        patience = self.config.repair_minutes * 60
        tries = line.kind == "upload" and line.open_message is not None  # it may train now, mended
        is_given_up = line.fails_since is not None and time.monotonic() - line.fails_since >= patience and not tries
        expected = self.spool.expected(line.silo, self.config.participations)
        return line.over or is_given_up or len(self.spool.of(line.silo)) >= expected  # who agrees to fewer has left

    def is_too_late(self) -> bool:
        """Whether the deadline has passed."""
        minutes = self.config.deadline_minutes
        return minutes is not None and time.time() > float(str(self.spool.fact("started"))) + minutes * 60
