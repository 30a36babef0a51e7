"""What classifiers reach that take part in no federation: what CrossLM has to be better than to be worth it.

Besides Standalone (section 5.2), which is the SLM after step 1, these are the simplest things that a silo could do by
itself: always the most frequent label, and a logistic regression on vectors of an off-the-shelf sentence encoder. Where
the silos' rows are all on one machine, as in a rehearsal on public text, there is also what all of them together reach.
"""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crosslm.config import Config, SLMSpec
from crosslm.data.examples import Examples
from crosslm.data.split import load_split
from crosslm.evaluate import share_right
from crosslm.models.encoder import Encoder, SentenceEncoder
from crosslm.models.slm import SLM
from crosslm.models.sources import check_model, model_folder, resolve_device
from crosslm.privacy.accounting import require_opacus
from crosslm.runs.loaded import load_client
from crosslm.runs.preparation import check_slm, client_specs
from crosslm.support.progress import Display, Progress
from crosslm.support.seeding import seed_for

ITERATIONS = 1000


def baselines(config: Config, cache: Path, display: Display | None = None) -> dict[str, dict[str, Any]]:
    """Each client's accuracies by itself and with all rows together, on the test rows that a run measures it on.

    Step 1 is as in a run of this configuration, from the same seed, under DP by DP-SGD; what all rows together reach is
    always without DP. Nothing is written, and no LLM is needed.

    Args:
        config: of a run.
        cache: where converted models are kept.
        display: shows progress.

    Returns:
        For each client, and as ``mean`` for the mean of all: ``rows``, ``test_rows`` (not of the mean) and accuracies
        ``most_frequent``, ``logistic``, ``logistic_balanced``, ``standalone`` and, with more than one client,
        ``logistic_together`` and ``slm_together``.

    Raises:
        CrosslmError: data or a model is not there or cannot be used.
    """
    config, progress = config.model_copy(update={"device": resolve_device(config.device)}), Progress(display)
    if config.privacy.epsilon:
        require_opacus()
    split = load_split(config)
    for warning in split.warnings:
        progress.note(f"warning: {warning}")
    specs = client_specs(config, list(split.private))
    check_model(config.selection.encoder, "selection.encoder")
    for name, spec in specs.items():
        check_model(spec.model, f"clients.{name}.model")
        check_slm(model_folder(spec.model, cache, progress.note), spec, config.privacy, f"client {name}")
    encoder = SentenceEncoder(model_folder(config.selection.encoder, cache, progress.note), config.device)
    pooled, many = together(split.private), len(specs) > 1
    of_all = trained_on_all(pooled, specs, config, cache, progress) if many else {}
    regressed = logistic_regression(pooled, encoder) if many else None
    found: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        private, test = split.private[name], split.tests[name]
        client = load_client(name, spec, model_folder(spec.model, cache), private, config, None, progress)
        client.train()
        found[name] = without_others(private, test, client.slm, encoder, progress, name)
        if regressed:
            found[name] |= {"logistic_together": regressed(test), "slm_together": of_all[spec].accuracy(test)}
    accuracies = [key for key in next(iter(found.values())) if not key.endswith("rows")]
    return found | {"mean": {key: statistics.fmean(each[key] for each in found.values()) for key in accuracies}}


def without_others(
    private: Examples, test: Examples, slm: SLM, encoder: Encoder, progress: Progress, who: str
) -> dict[str, Any]:
    """One silo's accuracies by itself, of its SLM after step 1 among others."""
    with progress.stage("compare", f"{who}: without others", 1, "set") as advance:
        found = {
            "rows": len(private),
            "test_rows": len(test),
            "most_frequent": share_right(test.labels, [most_frequent(private)] * len(test)),
            "logistic": logistic_regression(private, encoder)(test),
            "logistic_balanced": logistic_regression(private, encoder, balanced=True)(test),
            "standalone": slm.accuracy(test),
        }
        advance(1)
    return found


def most_frequent(examples: Examples) -> int:
    """The label that most rows have; of equals the first."""
    return max(sorted(set(examples.labels)), key=examples.labels.count)


def logistic_regression(private: Examples, encoder: Encoder, balanced: bool = False) -> Callable[[Examples], float]:
    """Fit scikit-learn's logistic regression, with its own settings, to the encoder's vectors as they are.

    With rows of one label there is nothing to regress, and it says always this label.

    Args:
        private: rows to learn from.
        encoder: makes vectors of texts.
        balanced: each label counts alike, however many rows it has.

    Returns:
        What gives its accuracy on test rows.
    """
    from sklearn.linear_model import LogisticRegression  # few commands need it

    if len(set(private.labels)) < 2:
        only = most_frequent(private)
        return lambda test: share_right(test.labels, [only] * len(test))
    regression = LogisticRegression(max_iter=ITERATIONS, class_weight="balanced" if balanced else None)
    fitted = regression.fit(encoder.encode(private.texts).cpu().numpy(), private.labels)
    return lambda test: share_right(test.labels, fitted.predict(encoder.encode(test.texts).cpu().numpy()).tolist())


def together(private: Mapping[str, Examples]) -> Examples:
    """All clients' rows."""
    return Examples(
        [text for rows in private.values() for text in rows.texts],
        [label for rows in private.values() for label in rows.labels],
    )


def trained_on_all(
    pooled: Examples, specs: Mapping[str, SLMSpec], config: Config, cache: Path, progress: Progress
) -> dict[SLMSpec, SLM]:
    """What a client could have if all private text lay in one place: an SLM of each architecture, trained as in step 1.

    Args:
        pooled: all clients' rows.
        specs: each client's architecture.
        config: of the run, with the device that is used.
        cache: where converted models are kept.
        progress: is told.
    """
    trained = {}
    for spec in dict.fromkeys(specs.values()):
        name = f"{spec.model}, {spec.num_hidden_layers}, {spec.pooling}"
        folder = model_folder(spec.model, cache, progress.note)
        slm = SLM.of_spec(folder, spec, config, seed_for(config.seed, "ceiling", name))
        rows = len(pooled) * config.slm.private.epochs
        with progress.stage("train SLM on pooled text", name, rows, "rows") as advance:
            slm.fit(pooled, config.slm.private, seed_for(config.seed, "ceiling", name, "order"), advance)
        trained[spec] = slm
    return trained
