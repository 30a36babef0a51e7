"""Which cells a table needs, and the configuration of each."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosslm.config import PRESETS, Config, Preset, merged
from crosslm.config_file import load, packaged
from crosslm.errors import ConfigError
from crosslm.reproduce.benchmarks import BENCHMARKS
from crosslm.reproduce.scale import Scale, Tables, with_split

TABLES = ("4", "5", "6", "7", "8", "skew", "clients", "rows", "ablation")
TASKS = ("sst2", "imdb", "ag_news", "yahoo_answers")
"""The packaged tasks that the tables are of."""
PRESET_NAMES: tuple[Preset, ...] = ("paper", "recommended")
RUN, CEILING, STANDALONE, ORIGINAL, BASE = "run", "ceiling", "standalone", "original", "base"
RUNS_LLM = "llm of run"
"""A run whose SLMs learned otherwise in step 5 than they would now; what came back to its clients does not count."""


@dataclass(frozen=True)
class Variation:
    """What differs from the scale: a name for paths and tables of configuration."""

    name: str
    tables: Tables = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Cell:
    """The smallest thing that is done and kept."""

    task: str
    """A packaged configuration, or ``original`` where the task does not matter."""
    method: str
    """A preset, ``ceiling`` (one SLM on all clients' text), ``standalone`` (each client's SLM on all its rows) or
    ``original`` (the LLM as it was)."""
    variation: Variation
    seed: int
    stage: str
    """``run`` (clients, baselines, LLM before and after), ``ceiling``, ``standalone``, or a benchmark of Table 7."""

    @property
    def path(self) -> str:
        """Where it is kept, without the ending."""
        return f"{self.task}/{self.method}/{self.variation.name}/seed-{self.seed}/{self.stage}"


@dataclass(frozen=True)
class Choice:
    """What of everything is wanted, and from where."""

    scale: Scale
    tables: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int
    presets: tuple[Preset, ...] = PRESET_NAMES
    split: str = "test"
    data_dir: Path = Path()
    known_variations: dict[tuple[str, str, str], list[Variation]] = field(
        init=False, default_factory=dict, compare=False
    )
    """Found once for each table, task and preset, since many configurations are read for it."""

    def config(self, task: str, preset: Preset, seed: int, tables: Tables) -> Config:
        """The configuration of a run: the task's, the scale's tables, and these over them."""
        scale = merged(self.scale.run, self.scale.task.get(task, {}))
        own = {"preset": preset, "seed": seed, "data": {"test": f"{self.split}.csv"}}
        over = with_split(merged(merged(scale, own), tables), self.split)
        return load(task, data_dir=str(self.data_dir / task), over=over)

    def cell_config(self, cell: Cell) -> Config:
        """The configuration of a cell; what belongs to no preset has the paper's."""
        task = self.scale.tasks[0] if cell.task == ORIGINAL else cell.task
        preset: Preset = "recommended" if cell.method == "recommended" else "paper"
        return self.config(task, preset, cell.seed, cell.variation.tables)


def choose(
    scale: Scale,
    tables: Sequence[str],
    tasks: Sequence[str],
    presets: Sequence[str],
    seeds: int | None,
    split: str,
    data_dir: Path,
) -> Choice:
    """A checked choice; what is not named is all that there is.

    Raises:
        ConfigError: a table, task, preset or split is unknown.
    """
    task_names = [name for name in tables if name in packaged()]
    if task_names:
        raise ConfigError(f"{task_names[0]!r} is no table but a task: name tasks with commas, --tasks sst2,imdb")
    of_scale = (*scale.tasks, *scale.task, *(task for table in scale.varied().values() for task in table.tasks))
    allowed: tuple[tuple[str, Sequence[str], Iterable[str]], ...] = (
        ("table", tables, TABLES),
        ("task", (*tasks, *of_scale), TASKS),
        ("preset", presets, PRESETS),
        ("split", [split], ("test", "validation")),
    )
    for what, given, known in allowed:
        for name in given:
            if name not in known:
                raise ConfigError(f"no {what} {name!r}; there are: {', '.join(known)}")
    return Choice(
        scale,
        tuple(dict.fromkeys(tables)) or TABLES,
        tuple(dict.fromkeys(tasks)) or scale.tasks,
        scale.seeds if seeds is None else seeds,
        tuple(preset for preset in PRESET_NAMES if preset in (presets or PRESET_NAMES)),
        split,
        data_dir,
    )


def plan(choice: Choice) -> list[Cell]:
    """Every cell that the chosen tables need, once: all tables of the first seed, then the next seed."""
    cells: dict[Cell, None] = {}
    for seed in range(choice.seeds):
        for table in choice.tables:
            cells |= dict.fromkeys(_cells(table, choice, seed) if _has(table, choice, seed) else ())
    return list(cells)


def cells_of(table: str, choice: Choice) -> list[Cell]:
    """Every cell that one table needs, once."""
    seeds = [seed for seed in range(choice.seeds) if _has(table, choice, seed)]
    return list(dict.fromkeys(cell for seed in seeds for cell in _cells(table, choice, seed)))


def _has(table: str, choice: Choice, seed: int) -> bool:
    """Whether a table has a seed: some have fewer than the rest."""
    varied = choice.scale.varied().get(table)
    return varied is None or varied.seeds is None or seed < varied.seeds


def may_be_kept(choice: Choice) -> list[Cell]:
    """What :func:`plan` gives and, where it leaves Standalone to the runs of preset ``paper``, its cells too."""
    cells = plan(choice)
    alone = [replace(cell, method=STANDALONE, stage=STANDALONE) for cell in cells if cell.stage == CEILING]
    return list(dict.fromkeys([*cells, *alone]))


def _cells(table: str, choice: Choice, seed: int) -> Iterable[Cell]:
    if table == "7":
        for benchmark in BENCHMARKS:
            yield Cell(ORIGINAL, ORIGINAL, Variation(BASE), seed, benchmark)
    for task in tasks_of(table, choice):
        for preset in choice.presets:
            for variation in variations(table, choice, task, preset):
                if table in ("4", "skew", "clients", "rows"):
                    yield Cell(task, CEILING, variation, seed, CEILING)
                if "paper" not in choice.presets and table in ("4", "skew", "clients", "rows", "ablation"):
                    compared = Variation(BASE) if table == "ablation" else variation
                    yield Cell(task, STANDALONE, compared, seed, STANDALONE)  # the runs of preset paper have it
                yield Cell(task, preset, variation, seed, RUN)
                if table == "7":
                    for benchmark in BENCHMARKS:
                        yield Cell(task, preset, variation, seed, benchmark)


def tasks_of(table: str, choice: Choice) -> tuple[str, ...]:
    """The chosen tasks that a table has."""
    varied = choice.scale.varied().get(table)
    return tuple(task for task in choice.tasks if varied is None or task in varied.tasks)


def variations(table: str, choice: Choice, task: str, preset: Preset) -> list[Variation]:
    """What a table varies; a change that changes nothing is the base."""
    key = (table, task, preset)
    if key not in choice.known_variations:
        base = choice.config(task, preset, 0, {})
        choice.known_variations[key] = [
            Variation(BASE) if choice.config(task, preset, 0, tables) == base else Variation(slug(name), tables)
            for name, tables in _changes(table, choice, task, preset).items()
        ]
    return choice.known_variations[key]


def _changes(table: str, choice: Choice, task: str, preset: Preset) -> dict[str, Tables]:
    scale = choice.scale
    if table == "skew":
        return {f"alpha-{alpha:g}": {"data": {"alpha": alpha}} for alpha in scale.skew.alpha}
    if table == "clients":
        return {f"clients-{count}": {"data": {"num_clients": count}} for count in scale.clients.num_clients}
    if table == "rows":
        return {f"rows-{count}": {"data": {"rows_per_client": count}} for count in scale.rows.rows_per_client}
    return _ablations(choice, task, preset) if table == "ablation" else {BASE: {}}


def _ablations(choice: Choice, task: str, preset: Preset) -> dict[str, Tables]:
    """No change, the scale's changes, and each field that ``recommended`` sets put back to the paper's value."""
    changes: dict[str, Tables] = {BASE: {}} | choice.scale.ablation.changes(preset)
    if preset == "recommended":
        paper = choice.config(task, "paper", 0, {}).model_dump(mode="json")
        for path in leaves(PRESETS["recommended"]):
            value: Any = paper
            for key in path:
                value = value[key]
            tables: Any = value
            for key in reversed(path):
                tables = {key: tables}
            changes[f"{'.'.join(path)} = {value}"] = tables
    return changes


def leaves(tables: Tables) -> list[tuple[str, ...]]:
    """The paths of all values in nested tables."""
    paths: list[tuple[str, ...]] = []
    for key, value in tables.items():
        paths += [(key, *rest) for rest in leaves(value)] if isinstance(value, dict) else [(key,)]
    return paths


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
