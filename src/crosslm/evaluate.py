"""What is measured, before and after (CrossLM, section 5.1)."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from crosslm.classification import class_probabilities
from crosslm.config import Config
from crosslm.data.examples import Examples
from crosslm.data.split import balanced_sample
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for
from crosslm.task import Task


def share_right(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Accuracy: the share of rows whose predicted label is theirs."""
    return sum(right == said for right, said in zip(gold, predicted, strict=True)) / len(gold)


def nlu_accuracy(llm: LLM, task: Task, examples: Examples, progress: Progress, detail: str) -> float:
    """Share of texts that the LLM classifies right by the verbalizers (Eq. 1)."""
    return share_right(examples.labels, nlu_predictions(llm, task, examples, progress, detail))


def nlu_predictions(llm: LLM, task: Task, examples: Examples, progress: Progress, detail: str) -> list[int]:
    """The label that the LLM gives each text by the verbalizers (Eq. 1)."""
    with progress.stage("evaluate", f"LLM classifies, {detail}", len(examples), "texts") as advance:
        predicted: list[int] = class_probabilities(llm, task, examples.texts, advance).argmax(dim=1).tolist()
    return predicted


def nlu_rows(config: Config, test: Examples) -> Examples:
    """The test rows that the LLM classifies: the same ones before and after, and for every seed of a run."""
    seed = seed_for(0, "nlu rows")
    return balanced_sample(test, config.evaluation.nlu_rows, len(config.task.labels), seed)


def base_texts(config: Config) -> int:
    """How many texts the original LLM writes at the beginning of a run.

    Data-free KD learns from them, the gate probes with them, judges are weighed by them, and they are what the LLM's
    writing is compared with.
    """
    return max(config.selection.pool, config.federation.closing_texts or 0, config.evaluation.nlg_samples)


def perplexity(llm: LLM, text: str, max_tokens: int, progress: Progress, moment: str) -> float:
    """:meth:`LLM.perplexity` of the first tokens of a text.

    Args:
        llm: as it is.
        text: of anything but the task.
        max_tokens: as many count.
        progress: is told.
        moment: says when this is.
    """
    count = min(max_tokens, len(llm.tokenizer.encode(text, add_special_tokens=False)))
    with progress.stage("evaluate", f"perplexity, {moment}", count, "tokens") as advance:
        return llm.perplexity(text, max_tokens, advance)


def label_agreement(slm: SLM, synthetic: SyntheticSet) -> float:
    """Share of synthetic texts whose intended label the classifier gives (NLG accuracy)."""
    predicted = slm.predict_proba(synthetic.texts).argmax(dim=1)
    return float((predicted == synthetic.labels).float().mean())


def confusion_counts(predicted: Sequence[int], labels: Sequence[int], num_classes: int) -> list[list[int]]:
    """How often a row of each label (first index) was given each label (second index)."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    for given, label in zip(predicted, labels, strict=True):
        counts[label][given] += 1
    return counts


def distinct_ngrams(texts: Iterable[str], n: int = 2) -> float:
    """Different n-grams of words among all n-grams (distinct-n): falls when texts repeat themselves.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models",
    NAACL 2016.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def with_mean(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Each client's figure and their ``mean``, as in the paper's tables."""
    return {**accuracies, "mean": statistics.fmean(accuracies.values())} if accuracies else {}


def load_judge(folder: str, config: Config) -> SLM:
    """The independent judge before its training: the first of ``slm.models``, with a head of its own.

    Raises:
        ModelError: it cannot be loaded.
    """
    return SLM.of_spec(folder, config.slm.models[0], config, seed_for(config.seed, "judge"))


def train_judge(judge: SLM, config: Config, held_out: Examples, progress: Progress) -> SLM:
    """The independent judge: a classifier of held-out gold text that never serves as reward."""
    fit = config.evaluation.judge
    with progress.stage("train judge", "held-out text", len(held_out) * fit.epochs, "rows") as advance:
        judge.fit(held_out, fit, seed_for(config.seed, "judge"), advance)
    return judge
