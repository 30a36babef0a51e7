"""Measuring a finished run again from the files in its folder."""

from pathlib import Path

from crosslm import evaluate
from crosslm.data.split import load_split
from crosslm.runs.finished import Run, has_other_data
from crosslm.runs.preparation import measured_on, perplexity_text_of
from crosslm.runs.rundir import RunDir
from crosslm.support.progress import Display, Progress
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize


def evaluate_run(run: RunDir, cache: Path, display: Display | None = None) -> dict[str, float]:
    """Measure what a run folder holds: its classifiers and its LLM, on the test rows of its configuration.

    Where the data files have changed since the run, that is said as a warning: it may be wanted.

    Args:
        run: a complete run.
        cache: where converted models are kept.
        display: shows progress.

    Returns:
        ``slm/accuracy/CLIENT``, ``llm/nlu_accuracy``, ``llm/nlg_accuracy_returned`` by the returned SLMs on
        newly written text (``nlg_accuracy`` of the summary is by the SLMs as first uploaded) and, where a text is
        configured, ``llm/perplexity``. Of a run between machines
        without what the files at the server cannot tell.

    Raises:
        CrosslmError: the run is not complete, or its data or models are gone.
    """
    finished = Run.open(run.path, cache)
    config, task = finished.config, finished.task
    progress = Progress(display)
    if run.is_between_machines():
        test, perplexity_text = measured_on(config)
        tests = {} if test is None else dict.fromkeys(finished.clients, test)
    else:
        split, perplexity_text = load_split(config), perplexity_text_of(config)
        test, tests = split.test, split.tests
        if has_other_data(config, split, finished.summary):
            progress.note(
                f"warning: {run.path}: the data files have changed since this run was made; these figures are of the "
                "files as they are now, and cannot be compared with those of summary.json"
            )
    slms = {client: finished.slm(client, own=False) for client in finished.clients}
    measures = {f"slm/accuracy/{client}": slms[client].accuracy(tests[client]) for client in slms if client in tests}
    llm = finished.llm(display)
    if test is None:
        progress.note(f"{config.data.test}: not here; accuracies on test rows are left out")
    else:
        rows = evaluate.nlu_rows(config, test)
        measures["llm/nlu_accuracy"] = evaluate.nlu_accuracy(llm, task, rows, progress, "again")
    if perplexity_text is not None:
        most = config.evaluation.perplexity_tokens
        measures["llm/perplexity"] = evaluate.perplexity(llm, perplexity_text, most, progress, "again")
    count = config.evaluation.nlg_samples
    with progress.stage("generate", "enhanced LLM", count, "texts") as advance:
        texts = synthesize(llm, task, config.synthesis, count, seed_for(config.seed, "evaluate"), advance)
    agreement = [evaluate.label_agreement(slm, texts) for slm in slms.values()]
    if agreement:
        measures["llm/nlg_accuracy_returned"] = sum(agreement) / len(agreement)
    return measures
