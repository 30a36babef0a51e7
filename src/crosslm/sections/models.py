"""The models and how they are trained: ``[slm]`` and ``[llm]``."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from crosslm.sections.section import Fraction, NonNegative, Positive, Section


class SLMSpec(Section):
    """One SLM architecture that clients may be given."""

    model: str
    """Folder, Hugging Face id or ``package:MODULE``."""
    num_hidden_layers: Positive | None = None
    """Keep only the lowest layers of ``model``."""
    pooling: Literal["mean"] | None = None
    """``mean``: the classification head reads the mean of a text's tokens, by one more layer on top (ours; models of
    the type bert). Often much better for sentence encoders. Not set: what the architecture's head reads."""


class FitConfig(Section):
    """How a classifier is trained on labelled text by cross-entropy."""

    epochs: Positive = 3
    """Passes over the rows; at most so many with ``patience``."""
    batch_size: Positive = 16
    """Rows in one optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Of AdamW, at its highest."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises; then it falls to 0."""
    weight_decay: NonNegative = 0.01
    """Of AdamW."""
    dtype: Literal["float32", "auto"] = "float32"
    """What training multiplies in. ``auto``: bfloat16 where the processor or GPU multiplies in it,
    and float32 elsewhere. Weights, their gradients and the optimiser are in float32 in any case, and so is
    all that a classifier says of texts, and training with DP-SGD."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many epochs without a lower hold-out loss and go back to the best; 0: never."""
    holdout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the rows that is held out where ``patience`` is set, and of ``slm.private`` where ``acceptance.enabled``
    is."""


class SLMConfig(Section):
    """The clients' classifiers."""

    models: tuple[SLMSpec, ...] = Field(min_length=1)
    """Architectures; each client without a model of its own gets one by the seed (section 5.1)."""
    max_length: Positive = 128
    """Tokens of a text that the SLM reads."""
    freeze_embeddings: bool = False
    """Train all but the word vectors, which would tell which words were in the rows (docs/privacy.md)."""
    private: FitConfig = FitConfig(epochs=8, patience=3)
    """Step 1: training on the private rows."""
    synthetic: FitConfig = FitConfig(epochs=3, learning_rate=3e-5)
    """Step 5: training on the selected synthetic rows."""
    soft_labels: bool = False
    """Step 5 learns the probabilities that the rewards are made of, instead of the label that a text was written
    for (ours, after Hinton et al. 2015). Worth it where several SLMs judge (``reward.teachers``)."""
    intended_labels: bool = False
    """In soft labels the label that a text was written for counts as one more judge, who is right as often as the
    others make it likely over the whole pool (ours, after Dawid and Skene 1979). Worth it where the LLM knows the
    labels better than the SLMs do. Without ``soft_labels`` it changes nothing."""
    llm_judges: bool = False
    """In soft labels the LLM is one more judge: its own probabilities of the labels (Eq. 1), freed of its preference
    for some of them, times the SLMs' (ours). Without ``soft_labels`` it changes nothing."""
    weigh_judges: bool = False
    """With ``llm_judges`` the SLMs' judgement and the LLM's count as far as each is as right as it is sure, by what
    texts of the original LLM were written for (ours, after Guo et al. 2017). A classifier that has learned a few
    hundred rows by heart is sure of everything, and else outvotes an LLM that is right more often; the mean of many
    classifiers is less sure than right, and else is outvoted. The LLM reads up to 768 texts more for each arrival."""
    interpolation: Fraction = 1.0
    """Share of step 5's weights in the SLM that goes back, the rest being those that came (ours,
    after Wortsman et al. 2022); 1 is the paper's."""

    @field_validator("private", "synthetic", mode="before")
    @classmethod
    def _keep_the_rest(cls, value: Any, info: ValidationInfo) -> Any:
        """A table that names some of the fields leaves the others with the defaults of this section."""
        if not isinstance(value, Mapping):
            return value
        return {**cls.model_fields[str(info.field_name)].default.model_dump(), **value}


class LLMConfig(Section):
    """The server's model and its update (Eq. 5 to 9)."""

    model: str
    """Folder, Hugging Face id or ``package:MODULE``."""
    vocabulary_texts: tuple[str, ...] = ()
    """Text files in ``data.dir``, or ``package:MODULE`` for the words of a tokenizer. The vocabulary
    is trimmed to what these need (and single bytes), which is faster; empty: the whole vocabulary.
    They must be texts that the server may see."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """What the weights are loaded as; an adapter and the logits are in float32 in any case. ``auto``: bfloat16 where
    the processor or GPU multiplies in it, which is about twice as fast there, and float32 elsewhere and with
    ``adapter = "full"``."""
    adapter: Literal["lora", "full"] = "lora"
    """``lora``: theta_old is the adapter switched off. ``full``: theta_old is a frozen copy."""
    lora_rank: Positive = 16
    """Rank of the adapter's matrices."""
    lora_alpha: Positive = 32
    """The adapter is scaled by ``lora_alpha / lora_rank``."""
    adapted_layers: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the LLM's layers that the adapter is in, counted from the top and rounded up. The layers below are the
    original's, which then are read once for both, and no gradient goes through them: an update takes less time and
    memory (docs/performance.md). 1: all of them, as in the paper."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of AdamW; lower it if the perplexity on other text rises too much."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    samples: Positive = 256
    """Synthetic texts written and trained on in one iteration, each once."""
    iterations: Positive = 1
    """Generate, reward, update: so often for one arriving SLM."""
    batch_size: Positive = 16
    """Texts in one optimiser step."""
    micro_batch_size: Positive = 16
    """Sequences in one backward pass; smaller needs less memory and computes the same."""
    gamma_generation: NonNegative = 1.0
    """Weight of the generation loss in Eq. 9."""
    generation_floor: NonNegative = 0.0
    """Eq. 5 pushes a text with a negative reward down until it is this many nats less likely than
    under the original LLM, in the units of ``token_reduction``. 0: without end, as in the paper."""
    gamma_language_modeling: NonNegative = 0.1
    """Weight of the language-modelling loss in Eq. 9."""
    gamma_kl: NonNegative = 0.05
    """Weight of the divergence from the original LLM in Eq. 9."""
    gamma_anchor: NonNegative = 0.0
    """Weight, beside those of Eq. 9, of the divergence from the original LLM on texts that it writes without a prompt:
    on all that has nothing to do with the task (ours). 0: the paper's."""
    anchors: Positive = 64
    """Texts that the original LLM writes so, once a run; each optimiser step takes the next eight of them, in an order
    of the update's own."""
    interpolation: Fraction = 1.0
    """Of the weights as they are after the last update, in the LLM that a run ends with (its folder, and what is
    measured after); the rest is the original's: it keeps more of what it knew, and loses little of what it learned.
    1: the LLM as trained, as in the paper. What clients get is the same."""
    token_reduction: Literal["sum", "mean"] = "sum"
    """Log-likelihoods summed over tokens (Eq. 6) or averaged; the same in Eq. 5, 7 and 8."""

    @model_validator(mode="after")
    def _fits_full_training(self) -> Self:
        if self.adapter == "full" and self.dtype == "bfloat16":
            raise ValueError(
                'llm.adapter = "full" trains the weights themselves, and in bfloat16 most are too coarse to move; '
                'found llm.dtype = "bfloat16", allowed are "float32" and "auto" (which is float32 here)'
            )
        if self.adapter == "full" and self.adapted_layers < 1:
            raise ValueError(
                f'llm.adapter = "full" trains all layers; found llm.adapted_layers = {self.adapted_layers:g}, allowed '
                'is 1, or llm.adapter = "lora"'
            )
        return self
