"""The configuration of a run: frozen, checked, TOML in and TOML out. Nothing here loads a model.

Every default is the paper's choice or, where the paper is silent, ours as listed in
``docs/paper_map.md``. What ``preset = "recommended"`` changes is in :data:`PRESETS`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, Field, ValidationInfo, model_validator

from crosslm.sections.federation import (
    AcceptanceConfig,
    CheckpointConfig,
    FederationConfig,
    GateConfig,
    IntakeConfig,
)
from crosslm.sections.method import EvaluationConfig, RewardConfig, SelectionConfig, SynthesisConfig
from crosslm.sections.models import FitConfig, LLMConfig, SLMConfig, SLMSpec
from crosslm.sections.privacy import NO_ACCEPTANCE, PrivacyConfig
from crosslm.sections.section import Device, Name, Section
from crosslm.sections.task import ClientConfig, DataConfig, TaskConfig, check_columns

__all__ = [
    "PRESETS",
    "AcceptanceConfig",
    "CheckpointConfig",
    "ClientConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "FitConfig",
    "GateConfig",
    "IntakeConfig",
    "LLMConfig",
    "Preset",
    "PrivacyConfig",
    "RewardConfig",
    "SLMConfig",
    "SLMSpec",
    "Section",
    "SelectionConfig",
    "SynthesisConfig",
    "TaskConfig",
    "merged",
]

Preset = Literal["paper", "recommended"]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "recommended": {
        "reward": {"baseline": "leave_one_out", "correct_prior": True, "teachers": 4},
        "llm": {"generation_floor": 5.0, "gamma_kl": 0.1, "interpolation": 0.7},
        "selection": {"class_balance": True, "fraction": 1.0},
        "slm": {"soft_labels": True, "llm_judges": True},
        "federation": {"closing": True},
        "gate": {"enabled": True, "teach_refused": True},
        "acceptance": {"enabled": True, "balanced": True},
    },
}
"""What each preset sets; the file and ``--set`` go over it. ``docs/results.md`` has what was measured of it."""
WHOLE = "# Written by crosslm, whole: no preset lies under this file. What it lacks has its plain default.\n"
"""How the file of a run begins: a later version, whose presets set more, reads the same of it. As the context of
``model_validate`` it says that what is given is whole."""


class Config(Section):
    """A whole run."""

    name: Name
    """Of the task; run folders are called after it."""
    preset: Preset = "recommended"
    """What lies under the file: the paper's method, or ours with what we think better."""
    seed: Annotated[int, Field(ge=0)] = 0
    """All randomness of a run is drawn from it."""
    device: Device = "auto"
    """``auto`` (CUDA if there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
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
    def _under_what_is_given_lies_the_preset(cls, given: Any, info: ValidationInfo) -> Any:
        if info.context == WHOLE:
            return given
        given = _as_tables(given)
        preset = given.get("preset", cls.model_fields["preset"].default) if isinstance(given, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return given
        return merged(_fitting(PRESETS[preset], given.get("privacy")), given)

    @model_validator(mode="after")
    def _one_source_of_clients(self) -> Self:
        if bool(self.clients) == bool(self.data.train):
            raise ValueError(
                "give either data.train (split among data.num_clients) or a [[clients]] table for each silo"
            )
        ids = [client.id for client in self.clients]
        if len({name.casefold() for name in ids}) != len(ids):  # of folders, which may know no capitals
            raise ValueError(f"clients must have ids that differ by more than capitals, found {ids}")
        return self

    @model_validator(mode="after")
    def _names_of_the_tasks_labels(self) -> Self:
        unknown = sorted(set(self.data.label_names.values()) - set(self.task.labels))
        if unknown:
            raise ValueError(f"data.label_names gives {unknown}; the task's labels are {list(self.task.labels)}")
        return self

    @model_validator(mode="after")
    def _two_columns_of_each_client(self) -> Self:
        for client in self.clients:
            data = self.data_of(client)
            try:
                check_columns(data.text_column, data.label_column)
            except ValueError as error:
                raise ValueError(f"clients.{client.id}: {error}") from error
        return self

    @model_validator(mode="after")
    def _no_acceptance_under_dp(self) -> Self:
        if self.privacy.epsilon is not None and self.acceptance.enabled:
            raise ValueError(NO_ACCEPTANCE)
        return self

    def data_of(self, client: ClientConfig) -> DataConfig:
        """How a client's own files are read: as ``[data]`` says, but for what the client says itself."""
        own = {"text_column": client.text_column, "label_column": client.label_column, "encoding": client.encoding}
        return self.data.model_copy(update={name: value for name, value in own.items() if value is not None})

    @property
    def texts_in_the_end(self) -> tuple[int, int]:
        """Of the texts of ``federation.closing`` how many are the original LLM's, and how many of the last pool."""
        count, pool = self.federation.closing_texts or self.selection.pool, self.selection.pool
        original = max(int(count * self.federation.closing_original + 1e-9), count - pool)  # 0.29 of 100 are 29
        return original, count - original

    @property
    def baseline_texts(self) -> int:
        """Texts that Data-free KD chooses from: as many as CrossLM's last step 5."""
        return sum(self.texts_in_the_end) if self.federation.closing else self.selection.pool

    @property
    def asks_llm(self) -> bool:
        """Whether step 5 always needs what the LLM itself makes of its texts (Eq. 1)."""
        return self.selection.llm_posterior or (self.slm.soft_labels and self.slm.llm_judges)

    @property
    def weighs_judges(self) -> bool:
        """Whether it matters how much the SLMs' judgement and the LLM's count."""
        judge_together = self.reward.llm_judges or (self.slm.soft_labels and self.slm.llm_judges)
        return judge_together and self.slm.weigh_judges

    def dump(self) -> str:
        """The whole configuration as TOML; ``crosslm.config_file.load`` of it gives an equal one."""
        return WHOLE + tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _fitting(preset: Mapping[str, Any], privacy: Any) -> Mapping[str, Any]:
    """The preset, without acceptance where the file asks for DP-SGD: it is outside that bound."""
    epsilon = privacy.get("epsilon") if isinstance(privacy, dict) else None
    return preset if epsilon is None else {name: value for name, value in preset.items() if name != "acceptance"}


def _as_tables(given: Any) -> Any:
    """Sections that were made in Python as tables of what was given of them: a preset lies under these too."""
    if isinstance(given, BaseModel):
        return {name: _as_tables(getattr(given, name)) for name in given.model_fields_set}
    if isinstance(given, dict):
        return {key: _as_tables(value) for key, value in given.items()}
    return given


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of ``base`` with those of ``over`` laid over them, at every depth."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
