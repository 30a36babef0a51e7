"""The gate: which uploaded SLM may reward the LLM, by what it does on texts of known label (ours).

The probe is what the original LLM wrote (which no client has influenced), public labelled texts if
there are any, and the pool of the last accepted arrival. The original LLM's texts carry many wrong
labels, so an honest SLM is only somewhat better than chance there: the bounds are one-sided, and a weak
client is refused only on evidence.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosslm.algorithm.agreement import correlation, label_auc, normal_quantile, upper_correlation
from crosslm.config import Config
from crosslm.data.examples import Examples
from crosslm.errors import ConfigError, QuarantineError
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet, Upload
from crosslm.support.progress import Advance
from crosslm.teachers import as_rewarding, stranger_proba

OTHERS = 2
"""With fewer accepted others there is no majority to agree with."""
COPY = 1e-3
"""Two classifiers whose probabilities differ by less than this on every text are one and the same."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found about an SLM."""

    figures: dict[str, float]
    predictions: Tensor
    """``(fixed texts, labels)``; empty of one that may not pass."""
    refusal: str = ""
    """Why it may not pass."""


@dataclass
class Gate:
    """Remembers what it needs of the SLMs that passed: their opinions, not their weights."""

    config: Config
    fixed: Examples
    """Texts of the original LLM, and public ones."""
    latest: Examples = field(default_factory=lambda: Examples([], []))
    """The pool of the last accepted arrival."""
    references: dict[str, Tensor] = field(default_factory=dict)
    """``(fixed texts, labels)`` for each accepted client: the probabilities of its last upload."""
    _found: tuple[Upload, Verdict] | None = field(default=None, repr=False)
    """What :meth:`lets_in` has found, until :meth:`judge` is asked of the same upload."""

    @classmethod
    def open(cls, config: Config, base: SyntheticSet, public: Examples) -> "Gate | None":
        """The gate of a run, before any client has come.

        Args:
            config: of the run.
            base: all that the original LLM wrote at the beginning; the first ``gate.texts`` of it are probed with.
            public: labelled public texts, if there are any.

        Returns:
            None where ``gate.enabled`` is false.

        Raises:
            ConfigError: all texts have one label, so that they can tell nothing.
        """
        if not config.gate.enabled:
            return None
        own = base.examples(range(min(len(base.samples), config.gate.texts)))
        fixed = Examples(own.texts + public.texts, own.labels + public.labels)
        if len(set(fixed.labels)) < 2:
            raise ConfigError(
                "gate: all texts to probe with have one label; raise selection.pool or give gate.public_texts"
            )
        return cls(config, fixed)

    @property
    def count(self) -> int:
        """How many texts an SLM is probed with."""
        return len(self.fixed.texts) + len(self.latest.texts)

    def judge(self, slm: SLM, upload: Upload) -> Verdict:
        """What was found of an SLM, which is probed if :meth:`lets_in` has not done so.

        Args:
            slm: it.
            upload: what it came in.

        Raises:
            QuarantineError: it may not reward the LLM; has the reasons and the figures.
            UploadError: it cannot classify at all.
        """
        verdict = self._verdict(slm, upload, lambda _: None)
        self._found = None
        if verdict.refusal:
            raise QuarantineError(verdict.refusal, verdict.figures)
        return verdict

    def lets_in(self, slm: SLM, upload: Upload, advance: Advance = lambda _: None) -> bool:
        """Whether an SLM may reward the LLM.

        Args:
            slm: it.
            upload: what it came in.
            advance: told how many texts were read since.

        Raises:
            UploadError: it cannot classify at all.
        """
        return not self._verdict(slm, upload, advance).refusal

    def _verdict(self, slm: SLM, upload: Upload, advance: Advance) -> Verdict:
        if self._found and self._found[0] is upload:
            advance(self.count)
        else:
            self._found = upload, self._probe(slm, upload, advance)
        return self._found[1]

    def _probe(self, slm: SLM, upload: Upload, advance: Advance) -> Verdict:
        bounds, texts = self.config.gate, [*self.fixed.texts, *self.latest.texts]
        if only := upload.only_label:
            why = (
                f"all its rows are {only!r}, so that its SLM cannot tell that label from others; "
                "give it rows of other labels too"
            )
            return self._refusal(upload, [why], {"texts": float(len(texts))})
        labels = torch.tensor([*self.fixed.labels, *self.latest.labels])
        predictions = stranger_proba(slm, texts, advance)
        if len(texts) < bounds.min_texts:
            return Verdict({"texts": float(len(texts))}, predictions[: len(self.fixed)])
        area, error = label_auc(predictions, labels)
        found = self._as_rewarding(slm, predictions, upload).argmax(dim=1)
        share = float(torch.bincount(found, minlength=predictions.shape[1]).max()) / len(texts)
        upper = area + normal_quantile(bounds.confidence) * error
        own = predictions[: len(self.fixed)]
        figures = {"texts": float(len(texts)), "auc": area, "auc_upper": upper, "largest_share": share}
        reasons = []
        if area <= 0.5 or upper < 0.5 + bounds.margin:
            reasons.append(
                f"its AUC is {area:.3f} (at most {upper:.3f}); chance and margin are {0.5 + bounds.margin:.3f}"
            )
        if share > bounds.max_share:
            reasons.append(f"it finds one label in {share:.1%} of the texts; {bounds.max_share:.1%} are allowed")
        reasons += self._against_others(own, upload.client_id, figures)
        return self._refusal(upload, reasons, figures) if reasons else Verdict(figures, own)

    def _refusal(self, upload: Upload, reasons: list[str], figures: dict[str, float]) -> Verdict:
        why = f"client {upload.client_id}: quarantined: {'; '.join(reasons)}; look at that client's data, "
        return Verdict(figures, torch.empty(0), why + "or set [gate] otherwise")

    def accepted(self, verdict: Verdict, upload: Upload, pool: SyntheticSet) -> None:
        """Remember an SLM that passed and was used, and the pool that came of it."""
        self.references[upload.client_id] = verdict.predictions
        self.latest = pool.examples(range(min(len(pool.samples), self.config.gate.texts)))

    def _as_rewarding(self, slm: SLM, predictions: Tensor, upload: Upload) -> Tensor:
        """The probabilities as Eq. 5 weighs them: a baseline takes away what all texts of a label have in common."""
        corrected = as_rewarding(slm, predictions, upload, self.config.reward)
        return corrected if self.config.reward.baseline == "none" else corrected - corrected.mean(dim=0)

    def _against_others(self, own: Tensor, client_id: str, figures: dict[str, float]) -> list[str]:
        others = {name: values for name, values in self.references.items() if name != client_id}
        reasons = [
            f"it is a copy of the SLM of {name}"
            for name, values in others.items()
            if float((own - values).abs().max()) < COPY
        ]
        if len(others) >= OTHERS:
            value = correlation(own, torch.stack(list(others.values())).mean(dim=0))
            upper = upper_correlation(value, len(own), self.config.gate.confidence)
            figures |= {"correlation": value, "correlation_upper": upper}
            least = self.config.gate.min_correlation
            if upper < least:
                reasons.append(
                    f"its correlation with {len(others)} others is {value:.3f} (at most {upper:.3f}); {least} is needed"
                )
        return reasons
