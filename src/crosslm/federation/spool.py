"""The server's spool: every upload and download is on its disk before anything is done about it.

Files are safetensors as they came. What happened to each is in a journal, so that a server that dies at any moment
finds on its next start what it has received, what it was working on, and what it still owes to whom.
"""

import fcntl
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from crosslm.errors import FederationError, UploadError
from crosslm.federation.arrivals_journal import Arrival, ArrivalsJournal
from crosslm.federation.hashed_files import unchanged, write_hashed
from crosslm.support.files import rename

TOLD = "told/"  # and a silo: how many of its rounds it has been told are complete
NO_SAY = "no say/"  # and silo and round
CLOSING = "closing/"  # and silo: the round whose upload the closing download is made of, and its SHA-256
LOSSES = "losses/"  # and silo and round: how often this disk has lost it
TRIES = "tries/"  # and silo, and round or "closing": how often its turn has come
AGREED = "agreed/"  # and silo: how many uploads it agrees to, as it said last
CLOSED = "closed/"  # and silo: what came of its closing download
ADMITTED = "admitted"  # the silos that have a key in the kit, as JSON
WORK = "working on"  # the second since when, and what
ENDED = "ended"  # no upload is asked for or served any more
OVER = "over"  # all that any silo will get is here
MOST_TRIES = 5  # at an upload or a closing with which the server ends, or for which this machine has no room


class Spool:
    """Uploads that came, downloads that go, and the journal of both. Safe for several threads."""

    def __init__(self, folder: Path) -> None:
        """Open a spool, or make one.

        Raises:
            FederationError: it cannot be opened.
        """
        self.folder = folder
        self._held: TextIO | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # classifiers that were trained on private text
        except OSError as error:
            raise FederationError(
                f"{folder}: the spool cannot be opened: {error}; it must be a folder that can be written"
            ) from error
        self._journal = ArrivalsJournal(folder / "journal.sqlite")

    def hold(self, seconds: float = 60.0) -> None:
        """Keep every other process from serving from this spool until this one ends.

        Raises:
            FederationError: another process does, and does not end in so many seconds.
        """
        self._held = open(self.folder / "lock", "w")  # noqa: SIM115  held until the process ends
        end = time.time() + seconds
        while True:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.time() > end:
                    raise FederationError(
                        f"{self.folder}: another process serves from it; end that one, or use another kit"
                    ) from None
                time.sleep(0.5)

    def close(self) -> None:
        """Close the journal, and let others serve."""
        self._journal.close()
        if self._held is not None:
            self._held.close()

    def put(self, silo: str, number: int, parts: Iterable[bytes]) -> bool:
        """Keep an upload; only then does it count as received.

        Args:
            silo: who sent it, as the transport knows the sender.
            number: its round, from 0.
            parts: its bytes.

        Returns:
            False if exactly this upload was here before.

        Raises:
            FederationError: another upload of the same silo and round was here before.
            RunError: it cannot be written.
        """
        path = self.upload_file(silo, number)
        digest, size = write_hashed(path.with_suffix(".part"), parts)
        with self._journal.lock:
            known = self._journal.arrival(silo, number)
            if known is not None:
                path.with_suffix(".part").unlink()
                if known.sha256 == digest:
                    return False
                raise FederationError(
                    f"silo {silo}: round {number} was received before with other contents "
                    f"(SHA-256 {known.sha256[:12]}, now {digest[:12]}); the first one counts, "
                    "and the silo must not use another state folder"
                )
            rename(path.with_suffix(".part"), path)
            self._journal.write(
                "INSERT INTO arrivals (silo, round, state, sha256, bytes, received_at) "
                "VALUES (?, ?, 'received', ?, ?, ?)",
                silo,
                number,
                digest,
                size,
                time.time(),
            )
        return True

    def admit(self, silos: Iterable[str]) -> None:
        """Note whose keys are in the kit: of a silo that was shut out nothing is used and nothing is owed to it.

        What it has sent waits until its key is back.
        """
        self.note(ADMITTED, json.dumps(sorted(silos)))

    def is_admitted(self, silo: str) -> bool:
        """Whether a silo's key was in the kit when the server was started last."""
        admitted = self.fact(ADMITTED)
        return admitted is None or silo in json.loads(admitted)

    def next(self) -> Arrival | None:
        """The upload that waits longest, or the one that was being worked on when the server stopped."""
        if not (waiting := self.waiting()):
            return None
        longest = waiting[0]
        sql = "UPDATE arrivals SET state = 'processing', started_at = ? WHERE number = ?"
        self._journal.write(sql, time.time(), longest.number)
        self.note(f"{TRIES}{longest.silo}/{longest.round}", str(self.tries(longest) + 1))
        return longest

    def waiting(self, are_admitted: bool = True) -> list[Arrival]:
        """Uploads that wait for their turn, or are worked on: of silos whose keys are in the kit, or of the others."""
        open_ones = [arrival for arrival in self.arrivals() if arrival.state in ("received", "processing")]
        return [arrival for arrival in open_ones if self.is_admitted(arrival.silo) == are_admitted]

    def tries(self, arrival: Arrival) -> int:
        """How often an upload's turn has come: more than once where the server ended meanwhile."""
        return int(self.fact(f"{TRIES}{arrival.silo}/{arrival.round}") or 0)

    def tries_to_close(self, silo: str) -> int:
        """How often a silo's closing download was begun: more than once where the server ended meanwhile."""
        return int(self.fact(f"{TRIES}{silo}/closing") or 0)

    def begin_closing(self, silo: str) -> None:
        """A silo's closing download is made now."""
        self.note(f"{TRIES}{silo}/closing", str(self.tries_to_close(silo) + 1))

    def upload(self, arrival: Arrival) -> bytes:
        """The bytes of an upload.

        Raises:
            FederationError: the file is not what was received.
        """
        return b"".join(unchanged(self.upload_file(arrival.silo, arrival.round), arrival.sha256))

    def unchanged_upload(self, arrival: Arrival, most: int) -> Path:
        """The file of an upload, which was read part by part and is what was received.

        Args:
            arrival: which.
            most: bytes that it may have (``intake.max_bytes``); a larger one is not read.

        Raises:
            FederationError: the file is not what was received.
            UploadError: it is larger.
        """
        path = self.upload_file(arrival.silo, arrival.round)
        size = path.stat().st_size if path.exists() else 0
        if size > most:
            raise UploadError(
                f"client {arrival.silo}: the upload has {size} bytes; at most {most} are allowed (intake.max_bytes)"
            )
        deque(unchanged(path, arrival.sha256), maxlen=0)  # reads all, and keeps nothing
        return path

    def serve(self, silo: str, number: int, download: bytes) -> None:
        """Keep the download that answers an upload; it is owed from now on.

        Raises:
            RunError: it cannot be written.
        """
        digest, _ = write_hashed(self.download_file(silo, number), [download])
        sql = "UPDATE arrivals SET state = 'served', served_at = ?, download_sha256 = ? WHERE silo = ? AND round = ?"
        self._journal.write(sql, time.time(), digest, silo, number)

    def no_say(self, silo: str, number: int) -> None:
        """The gate gives this upload no say: its silo is served, and counts nowhere."""
        self.note(f"{NO_SAY}{silo}/{number}", "1")

    def has_no_say(self, silo: str, number: int) -> bool:
        """Whether the gate gave an upload no say."""
        return self.fact(f"{NO_SAY}{silo}/{number}") is not None

    def counted(self) -> int:
        """Uploads that were served and had a say."""
        served = [arrival for arrival in self.arrivals() if arrival.state in ("served", "delivered")]
        return sum(not self.has_no_say(arrival.silo, arrival.round) for arrival in served)

    def close_silo(self, silo: str, number: int, download: bytes) -> None:
        """Keep the closing download of a silo (``federation.closing``); it is owed from now on.

        Args:
            silo: whose.
            number: the round of the upload that it is made of.
            download: its bytes.

        Raises:
            RunError: it cannot be written.
        """
        digest, _ = write_hashed(self.closing_file(silo), [download])
        self.note(f"{CLOSING}{silo}", f"{number} {digest}")

    def closing_of(self, silo: str) -> tuple[int, str] | None:
        """Round and SHA-256 of a silo's closing download, taken or not; None where there is none."""
        number, _, digest = (self.fact(f"{CLOSING}{silo}") or "").partition(" ")
        return (int(number), digest) if digest else None

    def owes_closing(self, silo: str) -> bool:
        """Whether a silo has not answered to its closing download."""
        return self.closing_of(silo) is not None and self.fact(f"{CLOSED}{silo}") is None

    def agrees(self, silo: str, number: int) -> None:
        """A silo says to how many uploads it agrees in all."""
        if self.fact(f"{AGREED}{silo}") != str(number):
            self.note(f"{AGREED}{silo}", str(number))

    def expected(self, silo: str, asked: int) -> int:
        """How many uploads come of a silo: so many as are asked for, or fewer where it said so."""
        return min(asked, int(self.fact(f"{AGREED}{silo}") or asked))

    def is_over_for(self, silo: str) -> bool:
        """Whether nothing more will be sent to a silo."""
        is_owed = any(arrival.delivered_at is None for arrival in self.of(silo)) or self.owes_closing(silo)
        return self.fact(OVER) is not None and not is_owed

    def closing_download(self, silo: str, digest: str) -> Iterator[bytes]:
        """The bytes of a closing download, part by part.

        Raises:
            FederationError: the file is not what was written; known after the last part.
        """
        return unchanged(self.closing_file(silo), digest)

    def closed(self, silo: str, note: str) -> None:
        """A silo has answered to its closing download."""
        self.note(f"{CLOSED}{silo}", note)

    def download(self, arrival: Arrival) -> Iterator[bytes]:
        """The bytes of a download, part by part.

        Raises:
            FederationError: the file is not what was written; known after the last part.
        """
        return unchanged(self.download_file(arrival.silo, arrival.round), str(arrival.download_sha256))

    def refuse(self, silo: str, number: int, why: str) -> None:
        """An upload cannot be used; it stays on disk."""
        sql = "UPDATE arrivals SET state = 'refused', note = ? WHERE silo = ? AND round = ?"
        self._journal.write(sql, why, silo, number)

    def forget(self, arrival: Arrival) -> None:
        """An upload is lost on this disk: it is as if it had not come, and its silo, which has it, is asked."""
        which = f"{arrival.silo}/{arrival.round}"
        self.note(f"{LOSSES}{which}", str(self.losses(arrival) + 1))
        self.note(f"{TRIES}{which}", "0")
        self._journal.write("DELETE FROM arrivals WHERE number = ?", arrival.number)

    def again(self, arrival: Arrival) -> None:
        """An upload that was served waits once more; its silo keeps what it has got."""
        which = f"{arrival.silo}/{arrival.round}"
        self.note(f"{TRIES}{which}", "0")
        self._journal.write("DELETE FROM facts WHERE name = ?", f"{NO_SAY}{which}")
        self._journal.write("UPDATE arrivals SET state = 'received' WHERE number = ?", arrival.number)

    def losses(self, arrival: Arrival) -> int:
        """How often an upload was lost on this disk."""
        return int(self.fact(f"{LOSSES}{arrival.silo}/{arrival.round}") or 0)

    def delivered(self, silo: str, number: int, note: str = "") -> None:
        """The silo has confirmed its download."""
        # one that waits once more does so, whatever its silo says of what it has got (:meth:`again`)
        state = "CASE state WHEN 'received' THEN state WHEN 'processing' THEN state ELSE 'delivered' END"
        sql = f"UPDATE arrivals SET state = {state}, delivered_at = ?, note = ? WHERE silo = ? AND round = ?"
        self._journal.write(sql, time.time(), note, silo, number)

    def not_delivered(self, silos: Iterable[str]) -> list[str]:
        """Silos that have not answered to a download, one of these to its closing download."""
        owed = [each.silo for each in self.arrivals() if each.state == "served" and self.is_admitted(each.silo)]
        return list(dict.fromkeys([*owed, *(silo for silo in silos if self.owes_closing(silo))]))

    def told(self, silo: str, number: int) -> None:
        """The silo knows that its upload was refused."""
        sql = "UPDATE arrivals SET delivered_at = ? WHERE silo = ? AND round = ?"
        self._journal.write(sql, time.time(), silo, number)

    def arrivals(self) -> list[Arrival]:
        """All, in order of arrival."""
        return self._journal.arrivals()

    def of(self, silo: str) -> list[Arrival]:
        """One silo's, in order of arrival."""
        return [arrival for arrival in self.arrivals() if arrival.silo == silo]

    def complete(self, silo: str) -> int:
        """How many of a silo's rounds are complete: it has answered to the download, or to there being none.

        The closing download counts as one more.
        """
        return sum(arrival.delivered_at is not None for arrival in self.of(silo)) + bool(self.fact(f"{CLOSED}{silo}"))

    def works_on(self, what: str) -> None:
        """Remember what the server is at work on from now on; nothing, where it is empty."""
        self.note(WORK, f"{time.time():.0f} {what}" if what else "")

    def work(self) -> tuple[str, float] | None:
        """What the server is at work on, and since when."""
        since, _, what = (self.fact(WORK) or "").partition(" ")
        return (what, float(since)) if since.isdigit() else None  # a server of an earlier version has said no time

    def note(self, name: str, value: str) -> None:
        """Remember a fact about the run under a name.

        Raises:
            RunError: the journal cannot be written.
        """
        self._journal.note(name, value)

    def fact(self, name: str) -> str | None:
        """A fact that was remembered."""
        return self._journal.fact(name)

    def upload_file(self, silo: str, number: int) -> Path:
        """Where an upload is kept."""
        return self.folder / f"{silo}-{number:04}-up.safetensors"

    def download_file(self, silo: str, number: int) -> Path:
        """Where a download is kept."""
        return self.folder / f"{silo}-{number:04}-down.safetensors"

    def closing_file(self, silo: str) -> Path:
        """Where a closing download is kept."""
        return self.folder / f"{silo}-closing-down.safetensors"
