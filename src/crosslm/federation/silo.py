"""A silo between machines: trains, uploads and installs when the server asks.

A request that comes twice is answered from what :mod:`crosslm.federation.silo_state` keeps; nothing is trained twice.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import float16, float32

from crosslm.client import Client
from crosslm.errors import DataError, DeclinedError, FederationError, KeptFileError, LeakError, UploadError
from crosslm.federation.intake import Intake, check_same_model
from crosslm.federation.leaving import answers, confirmation, contents, done, metric_names, refused
from crosslm.federation.messages import decode_upload, encode
from crosslm.federation.silo_models import CLOSING, SiloModels, told_by
from crosslm.models.slm import SLM
from crosslm.records import SlmState, Upload
from crosslm.support.plain import plain

OF_THE_DOWNLOAD = (UploadError, LeakError, FederationError)
"""What is wrong with what came, for good; anything else that goes wrong is this silo's own."""
MAX_REASON = 400  # letters of what the server says of an upload that it did not use
DTYPES = {"float32": float32, "float16": float16}


class Silo(SiloModels):
    """One silo as it answers the server."""

    def upload(self, experiment: str, number: int) -> Path:
        """Step 1: the file with a round's upload, trained now or, if it was asked for before, as it was sent then.

        Args:
            experiment: whom the request is from.
            number: the round, from 0.

        Raises:
            FederationError: the request is not one that this silo answers.
            DataError: the private file cannot be used.
            ModelError: the SLM cannot be loaded.
            KeptFileError: what was kept of it has changed on the disk.
        """
        self._check(experiment, number)
        path = self._sent(number)
        if path.exists():
            data = self._kept(path)
            if not self._metadata(number).exists():  # cut off before it was kept
                self._keep(self._metadata(number), json.dumps(told_by(decode_upload(data))).encode())
            self.now("waiting", number)
            return path
        if number < self.installed:
            raise FederationError(
                f"silo {self.settings.id}: round {number} is complete and what was sent in it is not kept any more; "
                "nothing is trained for it again: put its file back from a copy of the kit, if the server needs it"
            )
        if self.settings.privacy.epsilon and self._was_kept(self._metadata(number)):
            raise KeptFileError(
                f"silo {self.settings.id}: {path.name}, which round {number} was trained for and which may have been "
                "sent, is gone; under privacy.epsilon nothing is trained for it again, which would be a release more: "
                f"put {path.name} back from a copy of the kit"
            )
        self.now("training", number)
        client = self.client()
        self._would_pass(client.slm)
        upload = client.train()
        sent = self._as_sent(upload)
        data = encode(sent)
        self._receipt(number, upload, data, client.slm)
        if sent is not upload:
            self._keep(self._unrounded(number), encode(upload))
        else:  # one that was rounded may have been cut off here, before wire_dtype was changed
            self._unrounded(number).unlink(missing_ok=True)
        self._keep(path, data)
        self._keep(self._metadata(number), json.dumps(told_by(upload)).encode())
        self.now("waiting", number)
        return path

    def install(self, experiment: str, number: int, parts: Iterable[bytes]) -> dict[str, float]:
        """Step 5: keep the enhanced SLM, as ``state/slm`` for transformers.

        A round whose download is refused is complete all the same: the server sends none of it again, and this silo
        goes on with the SLM that it has. Where something of this silo's own is amiss (a file that is not there or has
        changed, a GPU that is gone), nothing is decided, and the server sends it again.

        Args:
            experiment: whom the message is from.
            number: the round.
            parts: the bytes of the download, one after the other; they go to the disk as they come.

        Returns:
            What the server is told: the round, whether the SLM was accepted, and no more.

        Raises:
            FederationError: it does not answer this silo's upload.
            UploadError: the download is refused by the intake's checks.
            ShortageError: this machine lacks what they need; nothing is decided.
            LeakError: it was trained on text that is too near to private text.
            DataError: the private file cannot be used.
            KeptFileError: what was kept of an SLM has changed on the disk.
        """
        self._check(experiment, number)
        if self.installed > number:
            return self._confirmation(number)
        upload = self._mine(number)
        try:
            with self._incoming(parts) as file:
                decision, had_say = self._install(number, file, upload)
        except OF_THE_DOWNLOAD as error:
            self._use(SLM.from_state(upload.slm, upload.slm.labels))
            self._keep_receipt("install", number, {"answer": refused(error)})
            self._complete(number, {"accepted": False, "rows": 0, "refused": f"{type(error).__name__}: {error}"})
            raise
        told = confirmation(number, decision["accepted"])
        self._keep_receipt("install", number, {"answer": self.done(number), "metrics": told})
        self._complete(number, decision | ({} if had_say else {"no_say": True}))
        return told

    def _install(self, number: int, file: Path, upload: Upload) -> tuple[dict[str, Any], bool]:
        client = self.client(self._rebuilt(upload.slm), number + 1)
        decision, had_say = self._try(number, file, upload, client)
        self._keep_file(self._downloaded(number), file)
        self._use(client.slm)
        return decision, had_say

    def _try(self, number: int, file: Path, upload: Upload, client: Client) -> tuple[dict[str, Any], bool]:
        """Check a download that answers an upload, and let a client with the SLM in use have it.

        Returns:
            What the client did with it, with ``test`` where this silo has test rows, and whether the upload had a say
            in it (``gate.teach_refused``).
        """
        settings = self.settings
        download = Intake(settings.labels, settings.intake).download(file, settings.id)
        if download.client_round != number:
            raise FederationError(
                f"silo {settings.id}: asked to install round {number}, got the download of round "
                f"{download.client_round}; look at the server's spool"
            )
        check_same_model(upload.slm, download.slm, f"silo {settings.id}")
        before = client.slm
        decision = vars(client.install(download)) | self._tested(before, download.slm)
        return decision, not download.metrics.get("no_say")

    def _tested(self, before: SLM, state: SlmState) -> dict[str, Any]:
        """What this silo's test rows say, if it has any. They decide nothing, nor do they stop anything."""
        try:
            test = self.test()
        except DataError as error:
            return {"not_tested": str(error)}
        if test is None:
            return {}
        returned = SLM.from_state(state, before.labels, str(before.device))
        return {"test": {"rows": len(test), "before": before.accuracy(test), "after": returned.accuracy(test)}}

    def close(self, experiment: str, number: int, parts: Iterable[bytes]) -> dict[str, float]:
        """Step 5 once more, when no more uploads come: try what came against the SLM in use, and keep the better.

        Args:
            experiment: whom the message is from.
            number: the round of the upload that it was made of.
            parts: of the download, as for :meth:`install`.

        Returns:
            As :meth:`install`.

        Raises:
            FederationError: it does not answer an upload of this silo whose round is complete.
            UploadError: the download is refused by the intake's checks.
            LeakError: it was trained on text that is too near to private text.
            DataError: the private file cannot be used.
        """
        self._check(experiment, number)
        if not self.settings.closing:
            raise FederationError(
                f"silo {self.settings.id}: agrees to no closing download; set closing = true in its kit for one"
            )
        if number >= self.installed:
            away = not self._sent(number).exists()
            raise (KeptFileError if away else FederationError)(
                f"silo {self.settings.id}: a closing download of round {number}, and {self.installed} are complete; "
                f"give it back the folder {self.state.name} that it had then, or look at the server's spool"
            )
        if self.closed is None:
            try:
                client = self.client()
                with self._incoming(parts) as file:
                    decision, _ = self._try(number, file, self._mine(number), client)
                    if decision["accepted"]:
                        self._keep_file(self.state / CLOSING, file)
            except OF_THE_DOWNLOAD as error:
                self._keep_receipt("close", number, {"answer": refused(error)})
                self._close({"accepted": False, "rows": 0, "refused": f"{type(error).__name__}: {error}"})
                raise
            self._use(client.slm)
            told = confirmation(number, decision["accepted"])
            self._keep_receipt("close", number, {"answer": self.done(number), "metrics": told})
            self._close(decision)
        closed = self.closed or {}
        if why := closed.get("refused"):
            raise FederationError(f"silo {self.settings.id}: the closing download was refused: {why}; look at its log")
        return confirmation(number, bool(closed.get("accepted")))

    def not_used(self, experiment: str, number: int, reason: str) -> None:
        """The server did not use the upload of a round and sends nothing back: go on with the SLM as it was sent.

        Args:
            experiment: whom the message is from.
            number: the round.
            reason: the server's words.

        Raises:
            FederationError: the message is not for this silo, or of a round that it has not uploaded.
        """
        self._check(experiment, number)
        if self.installed > number:
            return
        state = self._mine(number).slm
        self._use(SLM.from_state(state, state.labels))
        self._keep_receipt("not-used", number, {"answer": self.done(number)})
        self._complete(number, {"accepted": False, "rows": 0, "not_used": plain(reason[:MAX_REASON])})

    def _confirmation(self, number: int) -> dict[str, float]:
        """The answer again, whose first one was lost."""
        decision = self.decision(number)
        if why := decision.get("refused") or decision.get("not_used"):
            raise FederationError(
                f"silo {self.settings.id}: round {number} is complete without an SLM: {why}; look at the receipt"
            )
        return confirmation(number, decision["accepted"])

    def _would_pass(self, slm: SLM) -> None:
        """A model that the server would refuse is not trained, whether or not ``crosslm doctor`` was asked."""
        state = slm.to_state().in_dtype(DTYPES[self.settings.wire_dtype])
        who = f"silo {self.settings.id}: SLM {self.settings.slm.model!r}"
        Intake(self.settings.labels, self.settings.intake).untrained(state, who)

    def _as_sent(self, upload: Upload) -> Upload:
        dtype = DTYPES[self.settings.wire_dtype]
        return upload if dtype == float32 else replace(upload, slm=upload.slm.in_dtype(dtype))

    def would_send(self) -> dict[str, Any]:
        """Every tensor and every field that an upload has, and every field of every answer, before anything is trained.

        Values that training gives are there as they are before it: no metrics, but their names are in
        ``metrics_after_training``.
        """
        private, slm = self.private(), self.slm()
        slm.predict_proba(private.texts[:1])  # a tokenizer that was used once has its truncation written in it
        counts = tuple(private.class_counts(len(self.settings.labels)))
        upload = Upload(self.settings.id, self.installed, slm.by_output(counts), {}, slm.to_state())
        found, privacy = contents(self._as_sent(upload)), self.settings.privacy
        if privacy.told_counts != "exact":
            hidden = privacy.told_counts == "hidden"
            found["fields"]["class_counts"] = [0] * len(counts) if hidden else "the counts, with noise"
        names = metric_names(self.settings.fit, privacy)
        return {**found, "metrics_after_training": names, "answers": answers()}

    def _check(self, experiment: str, number: int) -> None:
        settings = self.settings
        if experiment != settings.experiment:
            raise DeclinedError(
                f"silo {settings.id}: takes part in {settings.experiment!r}, and not in {experiment!r}; "
                "start the server and the silo from kits that were made together"
            )
        if number < 0:  # or each would be one upload more than was agreed
            raise FederationError(f"silo {settings.id}: was asked about round {number}; the first must be 0")
        if number >= settings.max_participations:
            raise DeclinedError(
                f"silo {settings.id}: agrees to {settings.max_participations} uploads (max_participations) "
                f"and was asked for number {number + 1}; raise that number in its kit if you agree to more"
            )
        if number > self.installed:
            raise KeptFileError(
                f"silo {settings.id}: was asked about round {number}, but has completed only {self.installed}; "
                f"give it back the state folder that this silo had before"
            )

    def done(self, number: int) -> dict[str, Any]:
        """The answer of this silo, beside what it sends, to a request that it has done."""
        return done(number, self.settings.max_participations)

    def _receipt(self, number: int, upload: Upload, data: bytes, slm: SLM) -> None:
        receipt = {"bytes_sent": len(data), "answer": self.done(number), **contents(self._as_sent(upload))}
        if self.settings.wire_dtype != "float32":
            private = self.private()
            rounded = SLM.from_state(self._as_sent(upload).slm, slm.labels, str(slm.device))
            receipt["accuracy_on_private_rows"] = {
                "float32": slm.accuracy(private),
                self.settings.wire_dtype: rounded.accuracy(private),
            }
        self._keep_receipt("upload", number, receipt)
