"""The silo's side: step 1, train on private text; step 5, take the enhanced SLM back."""

from crosslm.config import FitConfig
from crosslm.leaks import LeakCheck
from crosslm.models.private_fit import PrivateTraining
from crosslm.models.slm import SLM
from crosslm.progress import Progress
from crosslm.records import Download, Examples, Upload
from crosslm.seeding import seed_for


class Client:
    """One silo. Its private text is read here and goes nowhere."""

    def __init__(
        self,
        client_id: str,
        private: Examples,
        slm: SLM,
        fit: FitConfig,
        seed: int,
        progress: Progress | None = None,
        privacy: PrivateTraining | None = None,
        leaks: LeakCheck | None = None,
    ) -> None:
        self.id = client_id
        self.slm = slm
        self.rounds = 0
        self._private = private
        self._fit = fit
        self._seed = seed
        self._progress = progress or Progress()
        self._privacy = privacy
        self._leaks = leaks

    def train(self) -> Upload:
        """Step 1: train the SLM on the private text, and pack it for upload."""
        seed = seed_for(self._seed, "client", self.id, self.rounds)
        rows = len(self._private) * self._fit.epochs
        with self._progress.stage("train SLM on private text", self.id, rows, "rows") as advance:
            fit = self._privacy.fit if self._privacy else SLM.fit
            metrics = fit(self.slm, self._private, self._fit, seed, advance)
        counts = tuple(self._private.class_counts(len(self.slm.labels)))
        if self._privacy:
            counts = self._privacy.class_counts(counts)
        upload = Upload(self.id, self.rounds, counts, metrics, self.slm.to_state())
        self.rounds += 1
        return upload

    def install(self, download: Download) -> None:
        """Step 5: use the enhanced SLM from now on.

        Raises:
            LeakError: it was trained on text that is too near to private text; the SLM stays the one it was.
        """
        if self._leaks:
            self._leaks.check(download.texts)
        frozen = not self.slm.model.get_input_embeddings().weight.requires_grad
        self.slm = SLM.from_state(download.slm, str(self.slm.device))
        self.slm.freeze_embeddings(frozen)
