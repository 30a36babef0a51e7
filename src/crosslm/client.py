"""The silo's side: step 1, train on private text; step 5, take the enhanced SLM back, unless it is worse."""

from dataclasses import dataclass

import torch

from crosslm.algorithm.agreement import sign_test
from crosslm.config import AcceptanceConfig, FitConfig
from crosslm.leaks import LeakCheck
from crosslm.models.private_fit import PrivateTraining
from crosslm.models.slm import SLM
from crosslm.progress import Progress
from crosslm.records import Download, Examples, SlmState, Upload
from crosslm.seeding import seed_for


@dataclass(frozen=True)
class Decision:
    """What a client did with a returned SLM, and why."""

    accepted: bool
    rows: int
    """Held-out private rows that both were tried on; 0: accepted untried."""
    before: float | None = None
    """Accuracy there of the SLM that the client had."""
    after: float | None = None
    """Accuracy there of the one that came."""


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
        acceptance: AcceptanceConfig | None = None,
        privacy: PrivateTraining | None = None,
        leaks: LeakCheck | None = None,
    ) -> None:
        self.id = client_id
        self.slm = slm
        self.previous: SLM | None = None
        """The SLM that the last accepted one took the place of."""
        self.rounds = 0
        self.told_counts: tuple[int, ...] | None = None
        """Rows of each label as the last upload told them."""
        self._private = private
        self._fit = fit
        self._seed = seed
        self._progress = progress or Progress()
        self._acceptance = acceptance or AcceptanceConfig()
        self._privacy = privacy
        self._leaks = leaks

    def train(self) -> Upload:
        """Step 1: train the SLM on the private text, and pack it for upload."""
        seed = seed_for(self._seed, "client", self.id, self.rounds)
        training = self._private
        if self._acceptance.enabled and (self._privacy or not self._fit.patience):  # DP-SGD holds no rows out
            training = self._private.take(self._order(self.rounds)[self._held() :])
        rows = len(training) * self._fit.epochs
        with self._progress.stage("train SLM on private text", self.id, rows, "rows") as advance:
            fit = self._privacy.fit if self._privacy else SLM.fit
            metrics = fit(self.slm, training, self._fit, seed, advance)
        counts = tuple(self._private.class_counts(len(self.slm.labels)))
        if self._privacy:
            counts = self._privacy.class_counts(counts)
        self.told_counts = counts
        upload = Upload(self.id, self.rounds, counts, metrics, self.slm.to_state())
        self.rounds += 1
        return upload

    def install(self, download: Download) -> Decision:
        """Step 5: use the enhanced SLM from now on, unless held-out private rows show that it is worse by the margin.

        The rows are those that the last training held out; with ``acceptance.enabled = false``, and
        where there are too few rows to hold one out, it is installed untried.

        Raises:
            LeakError: it was trained on text that is too near to private text; the SLM stays the one it was.
        """
        if self._leaks:
            self._leaks.check(download.texts)
        returned = SLM.from_state(download.slm, str(self.slm.device))
        returned.order_labels(self.slm.labels)
        returned.freeze_embeddings(not self.slm.model.get_input_embeddings().weight.requires_grad)
        decision = self._try(returned)
        if decision.accepted:
            self.previous, self.slm = self.slm, returned
        return decision

    def restore(self, state: SlmState, rounds: int, told_counts: tuple[int, ...] | None) -> None:
        """Go on from an earlier state: the SLM after so many trainings, and what was told of the rows."""
        frozen = not self.slm.model.get_input_embeddings().weight.requires_grad
        labels = self.slm.labels
        self.slm = SLM.from_state(state, str(self.slm.device))
        self.slm.order_labels(labels)
        self.slm.freeze_embeddings(frozen)
        self.rounds, self.told_counts = rounds, told_counts
        if self._privacy:
            self._privacy.go_on(rounds, told_counts)

    def _try(self, returned: SLM) -> Decision:
        if not self._acceptance.enabled or not self._held() or not self.rounds:
            return Decision(accepted=True, rows=0)
        holdout = self._private.take(self._order(self.rounds - 1)[: self._held()])
        labels = torch.tensor(holdout.labels)
        before, after = (slm.predict_proba(holdout.texts).argmax(dim=1) == labels for slm in (self.slm, returned))
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        is_worse = (lost - gained) / len(holdout) > self._acceptance.margin
        is_sure = sign_test(lost, gained) <= 1 - self._acceptance.confidence
        shares = float(before.float().mean()), float(after.float().mean())
        return Decision(not (is_worse and is_sure), len(holdout), *shares)

    def _held(self) -> int:
        """How many rows are held out; as :meth:`SLM.fit` counts them."""
        return round(self._fit.holdout_fraction * len(self._private))

    def _order(self, client_round: int) -> list[int]:
        """The rows as :meth:`SLM.fit` shuffles them in this round: the first are held out."""
        seed = seed_for(self._seed, "client", self.id, client_round)
        order: list[int] = torch.randperm(len(self._private), generator=torch.Generator().manual_seed(seed)).tolist()
        return order
