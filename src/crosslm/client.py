"""The silo's side: step 1, train on private text; step 5, take the enhanced SLM back, unless it is worse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from crosslm.algorithm.agreement import balancing_weights, sign_test
from crosslm.config import AcceptanceConfig, FitConfig
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, ModelError
from crosslm.models.batches import hold_out
from crosslm.models.slm import SLM
from crosslm.privacy.leaks import LeakCheck
from crosslm.privacy.private_fit import PrivateTraining
from crosslm.records import Download, SlmState, Upload
from crosslm.sections.privacy import NO_ACCEPTANCE, NO_LEAK_CHECK
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for

EXACT_SHARE = "holdout_accuracy"  # a fraction by which the number of rows may be found
ROUNDING = 1e-9  # of means and probabilities: what is just ``acceptance.margin`` is not above it


@dataclass(frozen=True)
class Decision:
    """What a client did with a returned SLM, and why."""

    accepted: bool
    rows: int
    """Held-out private rows that both were tried on; 0: accepted untried."""
    before: float | None = None
    """Accuracy there of the SLM that the client had; the mean of the labels' with ``acceptance.balanced``."""
    after: float | None = None
    """Accuracy there of the one that came."""
    balanced: bool = False
    """Whether each label counted alike in both (``acceptance.balanced``)."""


def split_rows(
    rows: int, fit: FitConfig, run_seed: int, client_id: str, canaries: int = 0
) -> tuple[list[int], list[int]]:
    """The places of the rows that a client trains on, and of those that it holds out, if it holds out any.

    The same in every round, or its SLM would be tried on rows that it has learned in an earlier one. In the first one
    they are those that :meth:`SLM.fit` draws itself. Canaries are the last rows, and always trained on.
    """
    generator = torch.Generator().manual_seed(seed_for(run_seed, "client", client_id, 0))
    return hold_out(rows, fit.holdout_fraction, generator, canaries)


class Client:
    """One silo. Its private text is read here and goes nowhere."""

    def __init__(
        self,
        client_id: str,
        private: Examples,
        slm: SLM,
        fit: FitConfig,
        seed: int,
        *,
        progress: Progress | None = None,
        acceptance: AcceptanceConfig | None = None,
        privacy: PrivateTraining | None = None,
        leaks: LeakCheck | None = None,
        canaries: int = 0,
        hides_counts: bool = False,
    ) -> None:
        """Set up.

        Args:
            client_id: the silo's name.
            private: its rows; the last ``canaries`` of them are planted.
            slm: its classifier, before step 1.
            fit: how step 1 trains.
            seed: of the run.
            progress: shows the training.
            acceptance: whether a returned SLM is tried on held-out rows; not with ``privacy``.
            privacy: trains within its budget.
            leaks: looks at the texts that trained a returned SLM; not with ``privacy``.
            canaries: how many rows are planted.
            hides_counts: tell zeros in the place of the rows of each label, and no share of rows; with ``privacy``,
                that decides.

        Raises:
            ConfigError: acceptance or the leak check is on under DP.
        """
        if privacy and acceptance and acceptance.enabled:
            raise ConfigError(f"client {client_id}: give it no acceptance; {NO_ACCEPTANCE}")
        if privacy and leaks:
            raise ConfigError(f"client {client_id}: give it no leak check; {NO_LEAK_CHECK}")
        self.id = client_id
        self.slm = slm
        self.previous: SLM | None = None
        """The SLM that the last accepted one took the place of."""
        self.rounds = 0
        self.told_counts: tuple[int, ...] | None = None
        """Rows of each of ``slm.labels`` as the last upload told them."""
        self.told_metrics: tuple[Mapping[str, float], ...] = ()
        """Of each upload so far."""
        self._private = private
        self._fit = fit
        self._seed = seed
        self._progress = progress or Progress()
        self._acceptance = acceptance or AcceptanceConfig()
        self._privacy = privacy
        self._leaks = leaks
        self._canaries = canaries
        self._hides_counts = hides_counts

    def train(self) -> Upload:
        """Step 1: train the SLM on the private text, and pack it for upload. Where that fails the SLM is as it was.

        Raises:
            ConfigError: under DP, the budget is spent.
            ModelError: what it learned is not finite; under DP, gradients of single rows cannot be had of this model.
        """
        seed = seed_for(self._seed, "client", self.id, self.rounds)
        training, split = self._private, self._split() if self._fit.patience else None  # SLM.fit holds them out
        if self._acceptance.enabled and split is None:
            training = self._private.take(self._split()[0])
        rows = len(training) * self._fit.epochs
        before = {name: value.clone() for name, value in self.slm.model.state_dict().items()}
        try:
            with self._progress.stage("train SLM on private text", self.id, rows, "rows") as advance:
                if self._privacy:
                    metrics = self._privacy.fit(self.slm, training, self._fit, seed, advance)
                else:
                    metrics = self.slm.fit(training, self._fit, seed, advance, canaries=self._canaries, split=split)
            if not self._privacy and not self.slm.is_finite():  # under DP it is uploaded, and refused, to be counted
                raise ModelError(
                    f"client {self.id}: step 1 left weights that are not finite, and its SLM is as it was before; "
                    "lower slm.private.learning_rate there"
                )
        except BaseException:  # what a private row has changed must not be in a later upload, uncounted under DP
            self.slm.model.load_state_dict(before)
            self.slm.model.eval()
            raise
        counts = tuple(self._private.class_counts(len(self.slm.labels)))
        if self._privacy:
            counts = self._privacy.class_counts(counts)
        elif self._hides_counts:
            counts = (0,) * len(counts)
            metrics = {name: value for name, value in metrics.items() if name != EXACT_SHARE}
        self.told_counts = counts
        upload = Upload(self.id, self.rounds, self.slm.by_output(counts), metrics, self.slm.to_state())
        self.rounds += 1
        self.told_metrics += (metrics,)
        return upload

    def install(self, download: Download) -> Decision:
        """Step 5: use the enhanced SLM from now on, unless held-out private rows show that it is worse by the margin.

        The rows are those that the last training held out; with ``acceptance.enabled = false``, where there are too few
        rows to hold one out, and where those held out have one label, it is installed untried.

        Raises:
            LeakError: it was trained on text that is too near to private text; the SLM stays the one it was.
        """
        if self._leaks:
            self._leaks.check(download.texts)
        returned = SLM.from_state(download.slm, self.slm.labels, str(self.slm.device))
        returned.freeze_embeddings(not self.slm.model.get_input_embeddings().weight.requires_grad)
        decision = self._try(returned)
        if decision.accepted:
            self.previous, self.slm = self.slm, returned
        return decision

    def restore(
        self,
        state: SlmState,
        rounds: int,
        told_counts: tuple[int, ...] | None,
        told_metrics: Sequence[Mapping[str, float]],
    ) -> None:
        """Go on from an earlier state.

        Args:
            state: the SLM as it was then.
            rounds: uploads until then.
            told_counts: what the last one told of the rows of each label.
            told_metrics: of each of them; the privacy budget goes on from there.

        Raises:
            ConfigError: under DP, those of an upload are missing.
        """
        self.go_on(rounds, told_counts, told_metrics)
        frozen = not self.slm.model.get_input_embeddings().weight.requires_grad
        self.slm = SLM.from_state(state, self.slm.labels, str(self.slm.device))
        self.slm.freeze_embeddings(frozen)

    def go_on(
        self, rounds: int, told_counts: tuple[int, ...] | None, told_metrics: Sequence[Mapping[str, float]]
    ) -> None:
        """Go on after so many uploads, with the SLM that this client was made with.

        Args:
            rounds: as for :meth:`restore`, and so are the others.
            told_counts: what the last one told of the rows of each label.
            told_metrics: of each of them.

        Raises:
            ConfigError: under DP, those of an upload are missing.
        """
        if self._privacy and len(told_metrics) != rounds:
            raise ConfigError(
                f"client {self.id}: {rounds} upload(s) were made and the metadata of {len(told_metrics)} is kept, so "
                "what is spent of privacy.epsilon cannot be known; start a new run"
            )
        self.rounds, self.told_counts, self.told_metrics = rounds, told_counts, tuple(told_metrics)
        if self._privacy:
            self._privacy.go_on(told_metrics, told_counts)

    def _try(self, returned: SLM) -> Decision:
        held = self._split()[1] if self._acceptance.enabled and self.rounds else []
        if not held:
            return Decision(accepted=True, rows=0)
        holdout = self._private.take(held)
        if len(set(holdout.labels)) == 1:  # one that finds that label everywhere cannot be beaten there
            return Decision(accepted=True, rows=0)
        labels, balanced = torch.tensor(holdout.labels), self._acceptance.balanced
        weights = balancing_weights(labels) if balanced else torch.ones(len(labels), dtype=torch.float64)
        before, after = (
            weights * (slm.predict_proba(holdout.texts).argmax(dim=1) == labels) for slm in (self.slm, returned)
        )
        is_worse = float((before - after).mean()) > self._acceptance.margin + ROUNDING
        is_sure = sign_test(after - before) <= 1 - self._acceptance.confidence + ROUNDING
        accuracies = float(before.mean()), float(after.mean())
        return Decision(not (is_worse and is_sure), len(holdout), *accuracies, balanced)

    def _split(self) -> tuple[list[int], list[int]]:
        return split_rows(len(self._private), self._fit, self._seed, self.id, self._canaries)
