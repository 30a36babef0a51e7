"""Measuring a finished run again from the files in its folder."""

from pathlib import Path

from crosslm import evaluate
from crosslm.config_file import load
from crosslm.data import load_split
from crosslm.errors import ModelError
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import resolve_device
from crosslm.preparation import original_llm, perplexity_text_of
from crosslm.progress import Display, Progress
from crosslm.rundir import CONFIG, RunDir
from crosslm.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task


def evaluate_run(run: RunDir, cache: Path, display: Display | None = None) -> dict[str, float]:
    """Measure what a run folder holds: its classifiers and its LLM, on the test rows of its configuration.

    Args:
        run: a complete run.
        cache: where converted models are kept.
        display: shows progress.

    Returns:
        ``slm/accuracy/CLIENT``, ``llm/nlu_accuracy``, ``llm/nlg_accuracy`` by the returned SLMs on
        newly written text and, where a text is configured, ``llm/perplexity``.

    Raises:
        CrosslmError: the run is not complete, or its data or models are gone.
    """
    clients = list(run.summary()["slm"]["crosslm"])
    clients.remove("mean")
    config = load(run.path / CONFIG)
    config = config.model_copy(update={"device": resolve_device(config.device)})
    progress, task, split = Progress(display), Task.from_config(config.task), load_split(config)
    perplexity_text = perplexity_text_of(config)
    try:
        slms = {client: SLM.load_trained(str(run.path / "slm" / client), config.device) for client in clients}
        for slm in slms.values():
            slm.order_labels(task.labels)
    except (OSError, ValueError) as error:
        raise ModelError(f"{run.path / 'slm'}: a classifier cannot be loaded: {error}") from error
    measures = {f"slm/accuracy/{client}": slm.accuracy(split.tests[client]) for client, slm in slms.items()}
    original = original_llm(config, cache, progress.note)
    llm = LLM.load_trained(original, str(run.path / "llm"), config.llm, config.device)
    rows = evaluate.nlu_rows(config, split.test)
    measures["llm/nlu_accuracy"] = evaluate.nlu_accuracy(llm, task, rows, progress, "again")
    if perplexity_text is not None:
        measures["llm/perplexity"] = llm.perplexity(perplexity_text, config.evaluation.perplexity_tokens)
    count = config.evaluation.nlg_samples
    with progress.stage("generate", "enhanced LLM", count, "texts") as advance:
        texts = synthesize(llm, task, config.synthesis, count, seed_for(config.seed, "evaluate"), advance)
    agreement = [evaluate.label_agreement(slm, texts) for slm in slms.values()]
    measures["llm/nlg_accuracy"] = sum(agreement) / len(agreement)
    return measures
