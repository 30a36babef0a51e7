"""How much of everything is run: the committed ``scale.toml`` or ``small.toml``, or another file of the same form."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from crosslm.config import Preset
from crosslm.errors import ConfigError
from crosslm.sections.section import NonNegative, Positive, Section

HERE = Path(__file__).parent
SMALL = Path("small")
Tables = dict[str, Any]


class Finetuning(Section):
    """The budget of Table 7, the same for the original LLM and every enhanced one."""

    train_rows: Positive = 512
    test_rows: Positive = 500
    epochs: Positive = 2
    batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    warmup_fraction: NonNegative = 0.1
    max_tokens: Positive = 160
    """Of each text of a pair."""


class Varied(Section):
    """A table that some tasks have."""

    tasks: tuple[str, ...]
    seeds: Positive | None = None
    """At most so many seeds; as many as the other tables if not set."""


class Skew(Varied):
    """Label skew among clients."""

    alpha: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


class Clients(Varied):
    """Number of clients."""

    num_clients: Annotated[tuple[Positive, ...], Field(min_length=1)]


class Rows(Varied):
    """Private rows of each client."""

    rows_per_client: Annotated[tuple[Positive, ...], Field(min_length=1)]


class Ablation(Varied):
    """Single changes by name, for each preset: tables of configuration."""

    paper: dict[str, Tables] = Field(default_factory=dict)
    recommended: dict[str, Tables] = Field(default_factory=dict)

    def changes(self, preset: Preset) -> dict[str, Tables]:
        """Those of one preset."""
        return self.paper if preset == "paper" else self.recommended


class Scale(Section):
    """Everything that fixes how much is run."""

    tasks: tuple[str, ...] = Field(min_length=1)
    seeds: Positive = 3
    run: Tables = Field(default_factory=dict)
    """Tables laid over every task's configuration; ``{split}`` in a text is ``test`` or ``valid``."""
    task: dict[str, Tables] = Field(default_factory=dict)
    """More tables, for one task."""
    finetuning: Finetuning = Finetuning()
    skew: Skew
    clients: Clients
    rows: Rows
    ablation: Ablation

    def varied(self) -> dict[str, Varied]:
        """The tables that are not the paper's."""
        return {"skew": self.skew, "clients": self.clients, "rows": self.rows, "ablation": self.ablation}


def load_scale(path: Path | None = None) -> Scale:
    """Read a scale file; the packaged ``scale.toml`` if none is named, and ``small.toml`` for ``small``.

    Raises:
        ConfigError: it cannot be read, or a key or value is wrong.
    """
    if path is None or path == SMALL:
        path = HERE / f"{path or 'scale'}.toml"
    try:
        return Scale.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a TOML file: {error}; mend it") from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(found)) from None


def with_split(tables: Mapping[str, Any], split: str) -> Tables:
    """The tables with ``{split}`` replaced in every text by PTB's name of the split."""
    name = "valid" if split == "validation" else split
    return {
        key: with_split(value, split)
        if isinstance(value, dict)
        else value.replace("{split}", name)
        if isinstance(value, str)
        else value
        for key, value in tables.items()
    }
