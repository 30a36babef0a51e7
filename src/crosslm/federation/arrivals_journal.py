"""The journal of a server's spool: a row for each upload, and facts about the run, in SQLite.

WAL and synced at each commit, so that what was written is there however the machine ends. Safe for several threads.
"""

import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from crosslm.errors import FederationError
from crosslm.federation.hashed_files import unwritable

SCHEMA = """
CREATE TABLE IF NOT EXISTS arrivals (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    silo TEXT NOT NULL,
    round INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('received', 'processing', 'served', 'delivered', 'refused')),
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    received_at REAL NOT NULL,
    started_at REAL,
    served_at REAL,
    delivered_at REAL,
    download_sha256 TEXT,
    note TEXT NOT NULL DEFAULT '',
    UNIQUE (silo, round)
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Arrival:
    """One upload and what became of it; times are seconds since 1970."""

    number: int
    """Order of arrival, from 1."""
    silo: str
    round: int
    state: str
    """``received``, ``processing``, ``served`` (its download waits), ``delivered`` or ``refused``."""
    sha256: str
    bytes: int
    received_at: float
    started_at: float | None
    served_at: float | None
    delivered_at: float | None
    download_sha256: str | None
    note: str

    @property
    def since(self) -> float:
        """When it came into its state."""
        times = {"processing": self.started_at, "served": self.served_at, "delivered": self.delivered_at}
        return times.get(self.state) or self.received_at


class ArrivalsJournal:
    """What happened to each upload, and facts by their names."""

    def __init__(self, path: Path) -> None:
        """Open a journal, or make one.

        Raises:
            FederationError: it cannot be opened.
        """
        self.path = path
        self.lock = threading.RLock()
        """For what must see and change rows at once."""
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise FederationError(
                f"{path.parent}: the spool cannot be opened: {error}; it must be a folder that can be written"
            ) from error

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def write(self, sql: str, *values: object) -> None:
        """Run a statement and commit it.

        Raises:
            RunError: the disk does not let it be written.
        """
        try:
            with self.lock, self._database:
                self._database.execute(sql, values)
        except sqlite3.OperationalError as error:
            raise unwritable(self.path, str(error)) from error

    def arrivals(self) -> list[Arrival]:
        """All uploads, in order of arrival."""
        with self.lock:
            rows = self._database.execute("SELECT * FROM arrivals ORDER BY number").fetchall()
        return [Arrival(*row) for row in rows]

    def arrival(self, silo: str, number: int) -> Arrival | None:
        """The upload of a silo's round."""
        with self.lock:
            sql = "SELECT * FROM arrivals WHERE silo = ? AND round = ?"
            row = self._database.execute(sql, (silo, number)).fetchone()
        return None if row is None else Arrival(*row)

    def note(self, name: str, value: str) -> None:
        """Remember a fact under a name.

        Raises:
            RunError: it cannot be written.
        """
        self.write("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def fact(self, name: str) -> str | None:
        """A fact that was remembered."""
        with self.lock:
            row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])
