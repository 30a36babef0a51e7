"""The ``[privacy]`` section."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from crosslm.errors import ConfigError
from crosslm.sections.section import Section

FAR_BELOW = 0.1  # one over the number of rows: there delta is no cause for doubt

NO_ACCEPTANCE = (
    "acceptance.enabled = true cannot be with privacy.epsilon: whether a returned SLM is kept depends on held-out "
    "private rows, is told to the server and decides where the next upload starts, all outside the bound; leave it "
    "out, or set it to false"
)

NO_LEAK_CHECK = (
    "max_shared_words and max_similarity cannot be with epsilon: whether a client refuses texts depends on its private "
    "rows and is told to the server, which may have chosen the texts to find that out, outside the bound; leave them "
    "out, or leave epsilon out"
)


class PrivacyConfig(Section):
    """Bounds on what an upload tells of single private rows, and the means to look for what it does tell."""

    epsilon: Annotated[float, Field(gt=0)] | None = None
    """Train step 1 with DP-SGD, within this budget for all uploads of a client together. Needs
    ``crosslm[privacy]``; ``slm.private.patience`` is not heeded then, and ``acceptance`` is off. Not set: no bound."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Well below one over the number of rows; from there up it is refused, and above a tenth of it warned of."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Norm that each row's gradient is clipped to."""
    trained_layers: Annotated[int, Field(ge=0)] | None = None
    """Under DP train only so many of the highest layers and what lies above them; 0: only the classification head;
    not set: all that is trained without DP."""
    center: bool = False
    """Under DP centre what the head reads by the mean over the private rows, told with noise within the budget (ours).
    Worth it where few rows train the head alone."""
    class_counts: Literal["hidden", "noisy", "exact"] = "hidden"
    """Under DP, what the upload tells of the rows of each label: zeros, numbers with noise, or the numbers, which are
    outside the bound."""
    hide_counts: bool = False
    """Without DP: tell zeros in the place of the rows of each label."""
    count_epsilon: Annotated[float, Field(gt=0)] = 0.5
    """Part of ``epsilon`` that noisy class counts take."""
    canaries: Annotated[int, Field(ge=0)] = 0
    """Plant so many sentences of random words in each client's rows, for ``crosslm audit``; in one process alone."""
    max_shared_words: Annotated[int, Field(gt=0)] | None = None
    """A client takes no SLM back that was trained on a text that has more words in a row from one of its private
    texts (characters, of a script without spaces: Chinese, Japanese, Thai, Lao, Khmer, Burmese). Not set: any. Not with
    ``epsilon``."""
    max_similarity: Annotated[float, Field(gt=-1, le=1)] | None = None
    """The same for the cosine of the sentence vectors of such a text and a private one."""

    @property
    def checks_leaks(self) -> bool:
        """Whether clients look at the texts that trained what comes back."""
        return self.max_shared_words is not None or self.max_similarity is not None

    @property
    def told_counts(self) -> Literal["hidden", "noisy", "exact"]:
        """What an upload tells of the rows of each label, with DP or without."""
        if self.epsilon is not None:
            return self.class_counts
        return "hidden" if self.hide_counts else "exact"

    @property
    def epsilon_of_counts(self) -> float:
        """What the class counts cost."""
        return self.count_epsilon if self.class_counts == "noisy" else 0.0

    @property
    def epsilon_of_training(self) -> float:
        """What is left for training."""
        return (self.epsilon or 0.0) - self.epsilon_of_counts

    def check_delta(self, rows: int, who: str) -> str | None:
        """Whether ``delta`` means anything beside so many private rows; without ``epsilon`` none is used.

        A mechanism that tells one row in ``1 / delta`` as it is keeps to it.

        Args:
            rows: of the client.
            who: has them.

        Returns:
            What is doubtful of it, if anything is.

        Raises:
            ConfigError: it is one over the number of rows, or more.
        """
        if self.epsilon is None or not rows or self.delta <= FAR_BELOW / rows:
            return None
        found = f"{who}: privacy.delta = {self.delta:g} with {rows} rows"
        advice = f"set it to {FAR_BELOW / rows / 10:.1g} or less"
        if self.delta >= 1 / rows:
            raise ConfigError(
                f"{found}: it must be below one over their number, or a bound may be kept by what tells a row of them "
                f"as it is; {advice}"
            )
        return f"{found} is not well below one over their number; {advice}"

    @model_validator(mode="after")
    def _no_leak_check_under_dp(self) -> Self:
        if self.epsilon is not None and self.checks_leaks:
            raise ValueError(NO_LEAK_CHECK)
        return self

    @model_validator(mode="after")
    def _a_budget_for_training(self) -> Self:
        if self.epsilon is not None and self.epsilon_of_training <= 0:
            raise ValueError(
                f"count_epsilon = {self.count_epsilon} leaves nothing of epsilon = {self.epsilon} for training"
            )
        return self
