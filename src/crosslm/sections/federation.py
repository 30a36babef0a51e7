"""Who comes when, what is let in, and what is kept: ``[federation]`` to ``[checkpoint]``."""

from typing import Annotated

from pydantic import Field

from crosslm.sections.section import Fraction, Positive, Section


class FederationConfig(Section):
    """Step 2: who comes when."""

    participations: Positive = 1
    """How often each client uploads; 1 is one-shot. In one process the order is drawn from the seed."""
    closing: bool = False
    """When no more uploads come, step 5 once more for every client that was served (ours): who came first then has as
    much of the others as who came last. The SLMs that came last judge the texts, as many as ``reward.teachers``, and
    the LLM as it is in the end where ``slm.llm_judges``. Between machines a silo stays for it, with the SLM that it got
    at once."""
    closing_original: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With ``closing``: share of its texts that the LLM wrote before it had learned anything; the others it wrote last.
    The former vary more, the latter fit their labels better."""
    closing_texts: Positive | None = None
    """With ``closing``: how many texts, as many as ``selection.pool`` where not set. Data-free KD, in one process, has
    as many. What the last arrival's pool lacks for its share is made up by more of the original LLM's."""
    arrivals: Positive | None = None
    """Between machines: end after so many uploads were served, whoever sent them; those that the gate gives no say
    do not count."""
    deadline_minutes: Annotated[float, Field(gt=0)] | None = None
    """Between machines: take no upload in later than so many minutes after the start."""
    reply_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Between machines: a silo that has not answered for so long is asked again."""
    repair_minutes: Annotated[float, Field(ge=0)] = 60.0
    """Between machines: a silo that refuses to train, or whose training fails, may be mended: it is asked again, and
    for so long the run does not end without it. The others are served meanwhile; only what comes in the end waits."""
    delivery_hours: Annotated[float, Field(ge=0)] = 24.0
    """Between machines: after the last step, and after a deadline too, the server stays for so long for silos that have
    not taken their enhanced SLM yet."""


class IntakeConfig(Section):
    """What an upload or download may be, before anything of it is loaded."""

    max_bytes: Positive = 2 * 2**30
    """Size of the whole file."""
    max_rms: Annotated[float, Field(gt=0)] = 100.0
    """Root mean square of the numbers of one tensor."""
    max_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Processor time for the checks."""


class GateConfig(Section):
    """Which SLM may reward the LLM (ours): ``docs/robustness.md`` has the statistics."""

    enabled: bool = False
    """Probe every upload with texts of known labels before it rewards the LLM; one that fails is kept apart."""
    teach_refused: bool = False
    """An SLM that may not reward the LLM gets step 5 all the same: it learns from the LLM's texts, whose labels others
    judge (ours). Else it gets nothing back."""
    new_head: bool = True
    """With ``teach_refused`` an SLM whose rows all have one label, as its class counts tell where they are told
    exactly, begins step 5 with a new output layer and learns as ``slm.private`` says (ours): its own layer says that
    label of every text, and is further from telling labels apart than one that has learned nothing. Not with
    ``privacy.epsilon``."""
    texts: Positive = 1024
    """At most so many texts of the original LLM, and as many of the last accepted arrival, to probe with."""
    min_texts: Positive = 100
    """With fewer texts to probe with, the gate can tell nothing and lets every SLM pass, but for one that says itself
    that all its rows have one label."""
    public_texts: str | None = None
    """Labelled public file in ``data.dir`` whose rows are probed with too."""
    margin: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """An SLM is refused if its AUC on the probe is below 0.5 + margin with the given confidence, or not above 0.5."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """How sure, one-sided, the tests of ``margin`` and ``min_correlation`` must be before an SLM is refused."""
    max_share: Fraction = 0.98
    """An SLM is refused if it finds one label in more than this share of the probe."""
    min_correlation: Annotated[float, Field(ge=-1, lt=1)] = 0.1
    """An SLM is refused if its correlation with the mean of at least two others is below this, with the confidence."""

    @property
    def teaches(self) -> bool:
        """Whether there may be SLMs that are taught and have no say."""
        return self.enabled and self.teach_refused


class AcceptanceConfig(Section):
    """What a client does with the SLM that comes back (ours)."""

    enabled: bool = False
    """Try it on held-out private rows and install it only if it is not worse; the old one is kept. Not with
    ``privacy.epsilon``, which does not bound what that tells; ``recommended`` leaves it off there."""
    balanced: bool = False
    """Each label counts alike there, however many of the rows have it: whether the labels are told apart better is
    decided, and not who knows better which of them are frequent at this client."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """So much accuracy it may lose there."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.9
    """How sure, one-sided, the client must be that it has lost any before it is refused: of a handful of held-out rows
    one or two are lost by chance."""


class CheckpointConfig(Section):
    """What a run keeps to go on from, and to go back to."""

    keep: Positive = 20
    """Of the last so many arrivals everything is kept; of those before, the LLM's adapter and its cause."""
