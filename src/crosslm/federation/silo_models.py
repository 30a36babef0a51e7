"""A silo's classifiers between machines: which one it goes on with, of all that its disk keeps.

Each round has an upload, as it was sent and, where that was rounded, as it was trained, and perhaps a download that was
accepted; the closing download may come last.
"""

import json
from pathlib import Path
from typing import Any

from crosslm.client import Client
from crosslm.errors import FederationError, KeptFileError
from crosslm.federation.messages import decode_download, decode_upload
from crosslm.federation.silo_state import SiloState
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.slm import SLM
from crosslm.models.sources import model_folder, resolve_device
from crosslm.privacy.leaks import LeakCheck
from crosslm.privacy.private_fit import PrivateTraining
from crosslm.records import SlmState, Upload
from crosslm.support.commands import command
from crosslm.support.files import replace_folder
from crosslm.support.seeding import seed_for

CLOSING = "closing.safetensors"


class SiloModels(SiloState):
    """One silo with its models. Nothing of the server's decides what is read here."""

    def __init__(self, kit: Path, cache: Path) -> None:
        """Open a kit.

        Raises:
            FederationError: it is not a silo's.
        """
        super().__init__(kit)
        self.cache = cache

    def client(self, slm: SLM | None = None, rounds: int | None = None) -> Client:
        """The client of the method.

        Args:
            slm: its classifier; not given: as it is after all complete rounds.
            rounds: uploads so far; not given: as many as are complete.
        """
        settings = self.settings
        rounds = self.installed if rounds is None else rounds
        private, slm, privacy, leaks = self.private(), slm or self.slm(), None, None
        if settings.privacy.epsilon:
            privacy = PrivateTraining(settings.privacy, settings.max_participations)
        if settings.privacy.checks_leaks:
            encoder = SentenceEncoder(model_folder(settings.encoder, self.cache), resolve_device(settings.device))
            leaks = LeakCheck(private.texts, settings.privacy, encoder)
        client = Client(
            settings.id,
            private,
            slm,
            settings.fit,
            settings.seed,
            acceptance=settings.acceptance,
            privacy=privacy,
            leaks=leaks,
            hides_counts=settings.privacy.told_counts == "hidden",
        )
        if rounds:
            told = [self._told(number) for number in range(rounds)]
            counts = tuple(told[-1]["class_counts"][label] for label in settings.labels)
            client.go_on(rounds, counts, [each["metrics"] for each in told])
        return client

    def slm(self) -> SLM:
        """The SLM as it is now: pretrained with a new head, as the server returned it, or as it was kept."""
        if (closed := self.closed) and closed["accepted"] and closed["rounds"] == self.installed:
            state = decode_download(self._kept(self.state / CLOSING)).slm
        elif self.installed:
            number = self.installed - 1
            if self.decision(number)["accepted"]:
                state = decode_download(self._kept(self._downloaded(number))).slm
            else:
                state = self._uploaded(number).slm
        else:
            return self.pretrained()
        return self._rebuilt(state)

    def trained(self) -> SLM:
        """The SLM in use: as it was trained here last, or as it came back and was installed.

        Raises:
            FederationError: nothing has been trained yet.
        """
        if self.installed or not self._sent(0).exists():
            if not self.installed:
                raise FederationError(
                    f"silo {self.settings.id}: has no classifier yet; it is trained when the server asks for it; "
                    f"start it with: {command('client', self.kit)}"
                )
            return self.slm()
        return SLM.from_state(self._uploaded(0).slm, self.settings.labels, resolve_device(self.settings.device))

    def _uploaded(self, number: int) -> Upload:
        """An upload of this silo as it was trained: what was rounded for the wire is not rounded here."""
        path = self._unrounded(number)
        return decode_upload(self._kept(path if path.exists() else self._sent(number)))

    def _mine(self, number: int) -> Upload:
        if not self._sent(number).exists():
            raise KeptFileError(
                f"silo {self.settings.id}: an answer to its upload of round {number}, which was never uploaded; give "
                f"it back the folder {self.state.name} that it had then"
            )
        return self._uploaded(number)

    def _told(self, number: int) -> dict[str, Any]:
        """What an upload told beside its weights, which are not read again for it.

        ``class_counts`` by label, and ``metrics``, which say what is spent of the privacy budget.
        """
        path = self._metadata(number)
        if not self._was_kept(path):  # an earlier version kept it in the upload alone
            return told_by(self._uploaded(number))
        found: dict[str, Any] = json.loads(self._kept(path))
        return found

    def _rebuilt(self, state: SlmState) -> SLM:
        slm = SLM.from_state(state, self.settings.labels, resolve_device(self.settings.device))
        slm.freeze_embeddings(self.settings.freeze_embeddings)
        return slm

    def _use(self, slm: SLM) -> None:
        """Make ``state/slm`` of the classifier that is in use from now on; where this fails the one before is there."""
        replace_folder(self.state / "slm", lambda folder: slm.save(str(folder)))

    def pretrained(self) -> SLM:
        """The SLM before any training, with a new head."""
        settings = self.settings
        return SLM.load(
            model_folder(settings.slm.model, self.cache),
            settings.labels,
            settings.max_length,
            seed_for(settings.seed, "head", settings.id),
            settings.slm.num_hidden_layers,
            settings.freeze_embeddings,
            resolve_device(settings.device),
            settings.slm.pooling,
        )


def told_by(upload: Upload) -> dict[str, Any]:
    """What an upload tells beside its weights: ``class_counts`` by label, and ``metrics``."""
    counts = dict(zip(upload.slm.labels, upload.class_counts, strict=True))
    return {"class_counts": counts, "metrics": dict(upload.metrics)}
