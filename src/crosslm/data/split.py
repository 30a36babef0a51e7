"""Which rows each client, the judge and the tests have (CrossLM, section 5.1)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from crosslm.config import Config, DataConfig
from crosslm.data.examples import Examples
from crosslm.data.hub import HUB
from crosslm.data.texts import is_there, load_examples
from crosslm.errors import DataError
from crosslm.support.seeding import seed_for

SAMPLE = "Replace this row"
"""How the rows begin that ``crosslm init`` writes for an example."""


@dataclass
class Split:
    """All the labelled text of a run."""

    private: dict[str, Examples]
    """Training rows of each client."""
    tests: dict[str, Examples]
    """Test rows of each client."""
    test: Examples
    """Test rows for the LLM, and of every client without test rows of its own (``data.test``)."""
    judge: Examples
    """Held-out rows that no client has."""
    warnings: list[str] = field(default_factory=list)


def load_split(config: Config) -> Split:
    """Read every file that the configuration names and give each client its rows.

    Raises:
        DataError: a file, column or label is wrong, or a silo is empty; names file and row.
    """
    data, labels = config.data, config.task.labels
    warnings: list[str] = []

    def rows(name: str, key: str, data: DataConfig = data) -> Examples:
        loaded = load_examples(name, data, labels, key)
        warnings.extend(loaded.warnings())
        return loaded.examples

    def measured_on(examples: Examples) -> Examples:
        # the same test rows for every seed of a run, so that seeds can be compared on them
        return balanced_sample(examples, data.test_rows, len(labels), seed_for(0, "test"))

    test = measured_on(rows(str(data.test), "data.test"))
    judge = rows(data.judge, "data.judge") if data.judge else Examples([], [])
    if config.clients:
        own = {client.id: config.data_of(client) for client in config.clients}
        private = {silo.id: rows(silo.train, f"clients.{silo.id}.train", own[silo.id]) for silo in config.clients}
        tests = {
            silo.id: measured_on(rows(silo.test, f"clients.{silo.id}.test", own[silo.id])) if silo.test else test
            for silo in config.clients
        }
        if data.rows_per_client:
            private = {
                name: sample(examples, data.rows_per_client, seed_for(config.seed, "rows", name))
                for name, examples in private.items()
            }
    else:
        everything = rows(str(data.train), "data.train")
        if not data.judge:
            if len(everything) - data.judge_rows < data.num_clients:
                raise DataError(
                    f"{data.train}: has {len(everything)} usable rows; data.judge_rows = {data.judge_rows} of them are "
                    f"held out for the judge, which leaves too few for {data.num_clients} clients; set data.judge_rows"
                )
            order = np.random.default_rng(seed_for(config.seed, "judge")).permutation(len(everything)).tolist()
            judge = everything.take(order[: data.judge_rows])
            everything = everything.take(order[data.judge_rows :])
        parts = dirichlet_split(
            everything.labels, data.num_clients, data.alpha, data.rows_per_client, seed_for(config.seed, "split")
        )
        private = {f"client-{number}": everything.take(part) for number, part in enumerate(parts)}
        tests = dict.fromkeys(private, test)
    if data.judge:
        judge = sample(judge, data.judge_rows, seed_for(config.seed, "judge"))
    files = {client.id: client.train for client in config.clients}
    for name, examples in private.items():
        if not len(examples):
            raise DataError(f"client {name}: {files.get(name, data.train)}: no usable training rows; put some there")
        if any(text.startswith(SAMPLE) for text in examples.texts):
            warnings.append(f"client {name}: learns sample rows of crosslm init: put your own in their place")
        doubt = one_label(f"client {name}", examples, labels)
        if doubt and config.privacy.told_counts == "exact":  # else no file of the run may say it
            warnings.append(doubt)
    if not len(test):
        raise DataError(f"{data.test}: no usable test rows; put labelled text into it")
    for client in config.clients:
        if not len(tests[client.id]):
            raise DataError(f"client {client.id}: {client.test}: no usable test rows; put labelled text into it")
    trained = {f"client {name}": rows for name, rows in private.items()} | {"the judge": judge}
    warnings.extend(seen_before(tests, test, trained, config.privacy.told_counts == "exact"))
    warnings.extend(not_independent(config, judge, private))
    return Split(private, tests, test, judge, warnings)


def seen_before(
    tests: Mapping[str, Examples], test: Examples, trained: Mapping[str, Examples], tells_counts: bool = True
) -> list[str]:
    """A warning for each who is trained on rows that are test rows too.

    Args:
        tests: of each client.
        test: of the LLM.
        trained: rows by who learns them, in words.
        tells_counts: whether it may be said how many.
    """
    tested = {text for rows in (*tests.values(), test) for text in rows.texts}
    return [
        f"{who}: {count if tells_counts else 'some'} of its training rows {_are(count, tells_counts)} too, on which "
        "accuracies say little; take them out of one of both"
        for who, count in _shared(trained, tested).items()
    ]


def not_independent(config: Config, judge: Examples, private: Mapping[str, Examples]) -> list[str]:
    """A warning for each client of whose rows the judge learns some: it then has what the rewards come from.

    Args:
        config: of the run, which says whether it may be said how many.
        judge: rows that the judge learns.
        private: of each client.
    """
    tells_counts = config.privacy.told_counts == "exact"
    what = (
        "take them out of data.judge" if config.data.judge else f"take out of {config.data.train} what is there twice"
    )
    return [
        f"the judge learns {count if tells_counts else 'some'} of the rows that client {name} has, and is no "
        f"independent judge of what is learned from these; {what}"
        for name, count in _shared(private, set(judge.texts)).items()
    ]


def _shared(rows: Mapping[str, Examples], texts: set[str]) -> dict[str, int]:
    """How many of their rows are among these texts, for those who have any."""
    counts = {who: sum(text in texts for text in examples.texts) for who, examples in rows.items()}
    return {who: count for who, count in counts.items() if count}


def _are(count: int, tells_counts: bool) -> str:
    return "is a test row" if count == 1 and tells_counts else "are test rows"


def one_label(who: str, private: Examples, labels: Sequence[str]) -> str | None:
    """A warning where all rows of a client have one label."""
    if len(set(private.labels)) != 1:
        return None
    only = labels[private.labels[0]]
    return f"{who}: all {len(private)} rows are {only!r}; its classifier can learn nothing else"


def test_rows(config: Config, warn: Callable[[str], None]) -> Examples | None:
    """The rows of ``data.test`` as every seed of a run has them; None if they are not there.

    ``warn`` is told of rows that were left out, and of a hub dataset that is not to be had.

    Raises:
        DataError: it is there and cannot be used.
    """
    data, labels = config.data, config.task.labels
    if not is_there(str(data.test), data):
        return None
    try:
        loaded = load_examples(str(data.test), data, labels, "data.test")
    except DataError as error:
        if not str(data.test).startswith(HUB):
            raise
        warn(f"{error}; accuracies are not measured here")
        return None
    for line in loaded.warnings():
        warn(line)
    return balanced_sample(loaded.examples, data.test_rows, len(labels), seed_for(0, "test"))


def dirichlet_split(
    labels: Sequence[int], num_clients: int, alpha: float, rows_per_client: int | None, seed: int
) -> list[list[int]]:
    """Rows for each client, with a label mix of its own, after Hsu et al. 2019 (section 5.1, [36]).

    Each client draws ``q ~ Dir(alpha * p)``, p being the label shares of all rows, and then rows
    without replacement, each of a label drawn from q; when a label runs out, from the labels left.

    Args:
        labels: label index of each row.
        num_clients: how many parts.
        alpha: concentration; towards 0 each client has one label, towards infinity all have p.
        rows_per_client: at most so many; an equal share of all rows if None.
        seed: everything random follows from it.

    Returns:
        For each client indices into ``labels``; no row is in two parts.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    left = [generator.permutation(np.flatnonzero(np.asarray(labels) == label)).tolist() for label in classes]
    share = len(labels) // num_clients
    size = share if rows_per_client is None else min(rows_per_client, share)
    parts: list[list[int]] = []
    for _ in range(num_clients):
        mix = generator.dirichlet(alpha * counts / counts.sum())
        part: list[int] = []
        for _ in range(size):
            weights = np.where([bool(rows) for rows in left], mix, 0.0)
            if weights.sum() <= 0:  # the labels of this client's mix are used up
                weights = np.array([float(len(rows)) for rows in left])
            part.append(left[generator.choice(len(classes), p=weights / weights.sum())].pop())
        parts.append(part)
    return parts


def sample(examples: Examples, rows: int | None, seed: int) -> Examples:
    """At most so many rows, drawn without replacement."""
    if rows is None or rows >= len(examples):
        return examples
    return examples.take(np.random.default_rng(seed).permutation(len(examples))[:rows].tolist())


def balanced_sample(examples: Examples, rows: int | None, num_classes: int, seed: int) -> Examples:
    """At most so many rows, as evenly over the labels as there are rows for it."""
    if rows is None or rows >= len(examples):
        return examples
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    by_label = [[row for row in order if examples.labels[row] == label] for label in range(num_classes)]
    in_turn = [queue[place] for place in range(max(map(len, by_label))) for queue in by_label if place < len(queue)]
    return examples.take(in_turn[:rows])
