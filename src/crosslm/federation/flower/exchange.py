"""The exchange over Flower: the spool, seen from the thread that trains; :mod:`.carrier` fills and empties it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from crosslm.config import FederationConfig
from crosslm.errors import FederationError, ShortageError, UploadError
from crosslm.federation.arrivals_journal import Arrival
from crosslm.federation.flower.carrier import POLL, TOLD, Carrier, Line
from crosslm.federation.intake import Intake
from crosslm.federation.messages import encode
from crosslm.federation.spool import ENDED, MOST_TRIES, Spool
from crosslm.records import Download, Upload
from crosslm.support.plain import plain

LATE = "it came when the run had ended; send it to the next run"
SHUT_OUT = "its key is not in the server's kit any more; put silos/NAME.pub back there, and start the server again"
LOST = "the server has lost it on its disk"
SHORTAGE_PAUSE = 10.0  # seconds until what there was no room for is tried again
TELL_REFUSED = 120.0  # seconds at the end of a run for silos to hear that their upload was not used
logger = logging.getLogger(__name__)


@dataclass
class FlowerExchange:
    """Implements :class:`crosslm.federation.exchange.Exchange` between machines."""

    grid: Grid
    spool: Spool
    experiment: str
    silos: list[str]
    config: FederationConfig
    intake: Intake
    names: Callable[[], list[str]] = list
    """Gives those whose keys are in the kit now: more than ``silos`` where some are new."""
    on_failure: Callable[[str, str], None] = lambda *_: None
    """Told in the thread that trains of a silo that is asked for no more, and why."""
    carrier: Carrier = field(init=False)

    def __post_init__(self) -> None:
        self.spool.admit(self.silos)
        most = self.intake.bounds.max_bytes
        self.carrier = Carrier(self.grid, self.spool, self.experiment, self.silos, self.config, most)
        self.carrier.has_ended = self.spool.fact(ENDED) is not None

    def start(self) -> None:
        """Begin to carry."""
        for arrival in self.spool.waiting(are_admitted=False):
            why = SHUT_OUT.replace("NAME", arrival.silo)
            logger.warning("silo %s, round %d: passed over: %s", arrival.silo, arrival.round, why)
        self.carrier.thread.start()

    def receive(self) -> Upload | None:
        """The upload that has waited longest; None when nobody waits, after a short while.

        An upload that does not pass the intake's checks is refused and noted in the journal; one that the disk has lost
        or changed is asked for again. One of a silo that was shut out is passed over.
        """
        self._look_at_carrier()
        arrival = self.spool.next()
        if arrival is None:
            self._wait()
            return None
        try:
            if (tries := self.spool.tries(arrival)) > MOST_TRIES:
                raise UploadError(
                    f"client {arrival.silo}: the server ended or had no room {tries - 1} times while it worked on its "
                    f"upload of round {arrival.round}; look at the server's logs"
                )
            file = self.spool.unchanged_upload(arrival, self.intake.bounds.max_bytes)
            upload = self.intake.upload(file, arrival.silo)
            if upload.client_round != arrival.round:
                raise UploadError(
                    f"silo {arrival.silo}: its upload of round {arrival.round} claims to be of round "
                    f"{upload.client_round}; give that silo back the folder state that belongs beside its silo.toml, "
                    "or make it a new kit"
                )
        except UploadError as error:
            self.refuse(arrival.silo, arrival.round, error)
            return None
        except FederationError as error:
            self._ask_again(arrival, error)
            return None
        except ShortageError as error:  # nothing is said of the upload: its turn comes again
            logger.error("%s", error)
            self.on_failure(arrival.silo, f"round {arrival.round}: {error}; tried again")
            time.sleep(SHORTAGE_PAUSE)
            return None
        return upload

    def send(self, download: Download, closing: bool = False) -> None:
        """Put a download into the spool; it is brought to its silo from there."""
        keep = self.spool.close_silo if closing else self.spool.serve
        keep(download.client_id, download.client_round, encode(download))
        self.carrier.to_carry.set()

    def refuse(self, silo: str, number: int, error: Exception) -> None:
        """An upload cannot be used: its silo is told, and is asked for its next one as any other."""
        why = plain(str(error))
        logger.error("silo %s, round %d: refused: %s", silo, number, why)
        if isinstance(error, UploadError) and error.told:
            self.spool.note(f"{TOLD}{silo}/{number}", error.told)
        self.spool.refuse(silo, number, why)
        self.carrier.to_carry.set()

    def _ask_again(self, arrival: Arrival, error: FederationError) -> None:
        """What the spool has of an upload is not what was received: its silo still has it, so nothing is lost.

        When no uploads are asked for any more, or it has been lost as often as an upload is tried, it is refused.
        """
        if self.carrier.has_ended or self.carrier.is_too_late() or self.spool.losses(arrival) >= MOST_TRIES:
            lost = UploadError(f"{LOST}: {error}")
            lost.told = LOST  # not where
            self.refuse(arrival.silo, arrival.round, lost)
            return
        logger.error("%s; silo %s is asked for its upload again", error, arrival.silo)
        self.on_failure(arrival.silo, f"round {arrival.round}: {error}; the silo is asked for it again")
        self.spool.forget(arrival)
        self.carrier.to_carry.set()

    def finished(self) -> bool:
        """Whether no upload is to be served any more."""
        self._look_at_carrier()
        self._let_in_the_new()
        if not self.carrier.has_ended and self._ends():
            self.carrier.has_ended = True
            self.spool.note(ENDED, str(time.time()))  # for a server that is started again
        return self.carrier.has_ended

    def _let_in_the_new(self) -> None:
        """A silo whose key has been put into the kit since the start is asked as any other."""
        for silo in self.names():
            if silo not in self.silos:
                logger.info("silo %s has come into the kit", silo)
                self.silos.append(silo)
                self.spool.admit(self.silos)
                self.carrier.lines[silo] = Line(silo)

    def _refuse_late(self) -> None:
        """Refuse what has come and will not be served, since the run has ended; its silos are told."""
        for arrival in self.spool.waiting():
            self.refuse(arrival.silo, arrival.round, UploadError(LATE))

    def _ends(self) -> bool:
        if self.config.arrivals is not None and self.spool.counted() >= self.config.arrivals:
            return True
        is_over = self.carrier.is_over()  # first: what comes after it is among the arrivals
        return is_over and not self.spool.waiting()

    def drain(self, seconds: float) -> list[str]:
        """Wait until all downloads are delivered, at most so long; then stop carrying.

        Returns:
            Silos that still wait for theirs.
        """
        end = time.monotonic() + seconds
        self._refuse_late()
        while time.monotonic() < end and self._owed():
            self._look_at_carrier()
            self._wait()
            self._refuse_late()
        end = time.monotonic() + TELL_REFUSED
        while time.monotonic() < end and self.carrier.untold():
            self._look_at_carrier()
            self._wait()
            self._refuse_late()
        self.carrier.stop()
        return self._owed()

    def _wait(self) -> None:
        self.carrier.carried.wait(POLL)
        self.carrier.carried.clear()

    def _owed(self) -> list[str]:
        return self.spool.not_delivered(self.silos)

    def _look_at_carrier(self) -> None:
        while not self.carrier.failed.empty():
            self.on_failure(*self.carrier.failed.get())
        if self.carrier.failure is not None:
            raise self.carrier.failure
