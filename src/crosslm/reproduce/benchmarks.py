"""Table 7: the LLM fine-tuned on tasks that it was not enhanced for (CrossLM, section 5.4).

The start is the original LLM, or an enhanced one with its adapter merged into the weights. Either gets a fresh LoRA
adapter with the same first values and the same rows in the same order, and is trained to give the verbalizer of the
right label (Eq. 1) the highest logit among the labels' verbalizers: no new head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from crosslm.config import DataConfig, LLMConfig
from crosslm.data.examples import Examples
from crosslm.data.split import sample
from crosslm.data.texts import load_examples
from crosslm.errors import DataError
from crosslm.models.batches import batches
from crosslm.models.llm import LLM
from crosslm.models.tokens import verbalizer_ids
from crosslm.reproduce.scale import Finetuning
from crosslm.support.seeding import seed_for
from crosslm.task import Task

PREDICTION_BATCH = 32


@dataclass(frozen=True)
class Benchmark:
    """A classification task of one text or two, as data."""

    columns: tuple[str, ...]
    template: str
    """M(x): the columns' texts, and words after which the verbalizer comes."""
    verbalizer: dict[str, str]
    """V(y) for each label."""

    def task(self) -> Task:
        """Labels and verbalizers; the query is the row's text as it is."""
        return Task(tuple(self.verbalizer), "{text}", (), (), tuple(self.verbalizer.values()))


BENCHMARKS = {
    "boolq": Benchmark(
        ("text_a", "text_b"), "{text_b}\nQuestion: {text_a}?\nAnswer (yes or no):", {"yes": "yes", "no": "no"}
    ),
    "cola": Benchmark(
        ("text",),
        "{text}\nIs this sentence acceptable English? Answer (yes or no):",
        {"acceptable": "yes", "unacceptable": "no"},
    ),
    "mrpc": Benchmark(
        ("text_a", "text_b"),
        "{text_a}\n{text_b}\nDo both sentences say the same? Answer (yes or no):",
        {"equivalent": "yes", "not_equivalent": "no"},
    ),
    "rte": Benchmark(
        ("text_a", "text_b"),
        "{text_a}\nDoes it follow that {text_b} Answer (yes or no):",
        {"entailment": "yes", "not_entailment": "no"},
    ),
}


def load_benchmark(benchmark: Benchmark, folder: Path, name: str) -> list[Examples]:
    """One set of rows for each column, all with the same labels.

    Raises:
        DataError: a file, column or label is wrong, or a text is missing.
    """
    loaded = []
    for column in benchmark.columns:
        data = DataConfig(dir=str(folder), test=name, text_column=column)
        part = load_examples(name, data, benchmark.task().labels)
        if part.warnings():
            raise DataError(f"column {column}: {part.warnings()[0]}; every row of a pair task needs both texts")
        loaded.append(part.examples)
    return loaded


def queries_of(benchmark: Benchmark, columns: Sequence[Examples], llm: LLM, max_tokens: int) -> Examples:
    """Each row as M(x), of each text the first ``max_tokens`` tokens."""
    texts = [
        benchmark.template.format(
            **{
                name: llm.shorten(text, max_tokens)
                for name, text in zip(benchmark.columns, (part.texts[row] for part in columns), strict=True)
            }
        )
        for row in range(len(columns[0]))
    ]
    return Examples(texts, columns[0].labels)


def start_llm(
    folder: str, trained: Path | None, enhanced_with: LLMConfig, fresh: LLMConfig, seed: int, device: str
) -> LLM:
    """The original LLM, or an enhanced one, with a fresh adapter whose first values come from the seed.

    Args:
        folder: the original model, with its whole vocabulary.
        trained: the ``llm`` folder of a run, or None for the original.
        enhanced_with: how the enhanced LLM was trained; after full fine-tuning it is a model of its own.
        fresh: rank and scale of the new adapter.
        seed: of the adapter.
        device: where the weights go.
    """
    lora = fresh.model_copy(update={"adapter": "lora"})
    if trained is None or enhanced_with.adapter == "full":
        return LLM.load(folder if trained is None else str(trained), lora, seed, device)
    enhanced = LLM.load_trained(folder, str(trained), enhanced_with, device)
    merged = enhanced.model.merge_and_unload()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LLM(merged, enhanced.tokenizer, lora)


def label_logits(llm: LLM, queries: Sequence[list[int]], verbalizers: Sequence[tuple[int, ...]]) -> Tensor:
    """Logits of each verbalizer's first token after the query, ``(queries, labels)``, with gradient.

    Queries are given as tokens. Verbalizers differ from the first token on (:func:`verbalizer_ids`).
    """
    causal = llm.model.get_base_model()
    encoded = [torch.tensor(query) for query in queries]
    lengths = torch.tensor([len(ids) for ids in encoded], device=llm.device)
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True).to(llm.device)
    attention = (torch.arange(ids.shape[1], device=llm.device) < lengths.unsqueeze(1)).long()
    hidden = causal.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(encoded), device=llm.device), lengths - 1]
    first = torch.tensor([tokens[0] for tokens in verbalizers], device=llm.device)
    logits: Tensor = last.float() @ causal.get_output_embeddings().weight[first].float().T
    return logits


def train(
    llm: LLM,
    rows: Examples,
    verbalizers: Sequence[tuple[int, ...]],
    budget: Finetuning,
    seed: int,
    advance: Callable[[float], None],
) -> None:
    """Minimise the cross-entropy of the right verbalizer among the labels', in batches of rows of like length."""
    generator = torch.Generator().manual_seed(seed)
    encoded = [llm.encode(text) for text in rows.texts]
    parameters = llm.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, weight_decay=0.0)
    steps = budget.epochs * -(-len(rows) // budget.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, round(budget.warmup_fraction * steps), steps)
    for _ in range(budget.epochs):
        for places in batches(encoded, budget.batch_size, generator):
            logits = label_logits(llm, [encoded[place] for place in places], verbalizers)
            loss = cross_entropy(logits, torch.tensor([rows.labels[place] for place in places], device=llm.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(len(places))


def fine_tune(
    llm: LLM, name: str, folder: Path, split: str, budget: Finetuning, seed: int, advance: Callable[[float], None]
) -> tuple[list[int], list[int]]:
    """Train on a benchmark's training rows and classify its test rows.

    Returns:
        The right labels of the test rows and the predicted ones.
    """
    benchmark = BENCHMARKS[name]
    verbalizers = verbalizer_ids(llm.tokenizer, benchmark.task())

    def rows(file: str, limit: int, rows_seed: int) -> Examples:
        # columns are of like length, so that one seed takes the same rows of each
        columns = [sample(column, limit, rows_seed) for column in load_benchmark(benchmark, folder, file)]
        return queries_of(benchmark, columns, llm, budget.max_tokens)

    training = rows("train.csv", budget.train_rows, seed_for(seed, name, "train"))
    # the same test rows for every seed, so that seeds differ in training alone
    test = rows(f"{split}.csv", budget.test_rows, seed_for(0, name, "test"))
    train(llm, training, verbalizers, budget, seed_for(seed, name, "order"), advance)
    return test.labels, predict(llm, test.texts, verbalizers, advance)


def predict(
    llm: LLM, texts: Sequence[str], verbalizers: Sequence[tuple[int, ...]], advance: Callable[[float], None]
) -> list[int]:
    """The label whose verbalizer has the highest logit, for each text."""
    encoded = [llm.encode(text) for text in texts]
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))  # those of like length together
    predicted = [0] * len(encoded)
    with torch.inference_mode():
        for start in range(0, len(order), PREDICTION_BATCH):
            places = order[start : start + PREDICTION_BATCH]
            logits = label_logits(llm, [encoded[place] for place in places], verbalizers)
            for place, label in zip(places, logits.argmax(dim=1).tolist(), strict=True):
                predicted[place] = label
            advance(len(places))
    return predicted


def matthews(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Matthews correlation of two labels: Pearson's correlation of the two 0/1 columns; 0 if one is constant."""
    if len(set(gold)) < 2 or len(set(predicted)) < 2:
        return 0.0
    return float(np.corrcoef(gold, predicted)[0, 1])
