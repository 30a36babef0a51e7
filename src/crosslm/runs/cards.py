"""Model cards and the data card: what a run's artefacts are, from its ``summary.json`` alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from crosslm.config import Config
from crosslm.models.sources import PACKAGES, PREFIX
from crosslm.privacy.bounds import guarantee, how_told, in_words, uploaded
from crosslm.runs.rundir import RunDir

TAGS = ["crosslm", "federated-learning", "synthetic-data"]
METHOD_WORDS = {"standalone": "private text only", "data_free_kd": "data-free KD", "crosslm": "CrossLM"}
MEASURES = {
    "nlu_accuracy": "classifies test text right",
    "nlg_accuracy": "writes to the label, say the clients' classifiers",
    "nlg_judge_accuracy": "writes to the label, says an independent judge",
    "distinct_2": "different word pairs among all it writes",
    "perplexity": "perplexity on the given text (lower is better)",
}
PARTS = {
    "selected": "the texts that classifiers were trained on",
    "all": "every text that was written and kept on disk",
}
COLUMNS = (
    ("`text`, `label`, `prompt`", "what was written, the label asked for, and the prompt"),
    (
        "`source`",
        "`base`: the original model; `drafts`: what the model learned from; `pool`: what a classifier's texts"
        " were chosen from; `closing`: the same in the end, for all classifiers; `final`: the model at the end",
    ),
    ("`step`, `client`", "in which step, and whose classifier was at work"),
    ("`reward`", "2 p - 1, p being the judges' probability of the label (Eq. 4)"),
    ("`diversity`, `score`, `rank`, `kept`", "how it was chosen (Eq. 10); `kept`: it trained the classifier"),
    ("`seed`", "of its sampling"),
)
PAPER = "[CrossLM](https://arxiv.org/abs/2312.05842)"


def write_cards(run: RunDir, config: Config, summary: Mapping[str, Any]) -> None:
    """Put a ``README.md`` into the folder of every model of a run."""
    trained = [event for event in run.events() if event["event"] in ("step", "closing") and event.get("accepted", True)]
    chosen = {event["client"]: int(event.get("selected", 0)) for event in trained}
    for client in clients_of(summary):
        run.write(f"slm/{client}/README.md", slm_card(client, chosen.get(client, 0), config, summary))
    run.write("llm/README.md", llm_card(config, summary))


def clients_of(summary: Mapping[str, Any]) -> list[str]:
    """Clients that got an enhanced SLM."""
    return sorted(set(summary["slm"]["crosslm"]) - {"mean"})


def _without_a_say(summary: Mapping[str, Any]) -> set[str]:
    return set(summary.get("no_say", ()))


def _judges(client: str, summary: Mapping[str, Any]) -> str:
    return "others had judged" if client in _without_a_say(summary) else "this classifier itself had judged"


def slm_card(client: str, selected: int, config: Config, summary: Mapping[str, Any], own: bool = False) -> str:
    """The card of a client's enhanced classifier.

    Args:
        client: whose it is.
        selected: synthetic texts that it was trained on in its last step.
        config: of the run.
        summary: what ``summary.json`` holds.
        own: the card of the one that it uploaded, and kept.
    """
    about = summary["clients"][client]
    # what others' rows shaped has come back to all but one that was kept, and was trained once
    shaped_by = [client] if own and config.federation.participations == 1 else uploaded(summary)
    measured = {method: summary["slm"][method].get(client) for method in METHOD_WORDS}
    this = "standalone" if own else "crosslm"
    how = f"first on private text, then on text that a language model wrote and that {_judges(client, summary)}"
    decision = about.get("decision") or {}
    if own:
        refused = decision.get("refused")
        # the words of an error may tell of private rows, and a card is made to be given away
        kind = str(refused).partition(":")[0]
        why = f"was refused there ({kind})" if refused else "was worse on its owner's held-out rows"
        many = config.federation.participations > 1
        before = " and on what earlier rounds brought" if many else ""
        how = f"on private text{before}. Its owner kept it: the one that came back {why}"
        measured = {} if many else measured  # which is of its first upload
    elif not decision.get("accepted", True):
        how += ". **Its owner did not accept it, and uses the one that it had before**"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=TAGS,
        base_model=_hub_id(about["model"]["model"]) if about["model"]["model"] else None,
        model_name=f"{config.name}-{client}",
        eval_results=_results(config, client, measured.get(this)),
    )
    rows = in_words(list(about["rows"]), list(about["rows"].values()))
    words = {method: f"{name} (this model)" if method == this else name for method, name in METHOD_WORDS.items()}
    known = [(words[method], f"{value:.3f}") for method, value in measured.items() if value is not None]
    accuracy = "Measured at the silo, not known to the server that wrote this card."
    if own:
        accuracy = "Not measured by itself: the run's figures are of the first upload, and of what came back."
    if known:
        accuracy = (
            f"On {summary['test_rows'][client]} test rows; one seed, so differences of a few points are noise.\n\n"
            + _table(("method", "accuracy"), known)
        )
    return f"""---
{data.to_yaml()}
---

# {config.name}: the classifier of {client}

Tells these labels apart: {_listed(config.task.labels)}. It was trained with {PAPER}: {how}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER OR REPOSITORY")
# cut as in its training; without that, long texts fail
classify("A text.", truncation=True, max_length={config.slm.max_length})
```

## Training

| | |
| --- | --- |
| base model | {_layers(about["model"])} |
| licence of the base model | {_licence(str(about["model"]["model"]))} |
| licence of the LLM that wrote its synthetic texts | {_licence(config.llm.model)} |
| private training rows | {rows} |
| synthetic texts chosen for its last update | {selected} |
| preset | {config.preset} |
| seed | {config.seed} |
| tokens read of a text | {config.slm.max_length} |
| versions | {_versions(summary)} |

## Accuracy

{accuracy}

## Privacy

No private text is in these files, but the weights were fitted to it, {guarantee(summary, shaped_by)} To train it,
{about["bytes_up"]:,} bytes (weights, tokenizer, label names, {_counts_that_left(how_told(summary, client))}
Ask the silo before you give this model or this card to anybody else.
"""


def _counts_that_left(how: str) -> str:
    if how == "hidden":
        return "training metrics) left the\nsilo; how many rows there are of each label did not."
    noise = " with noise," if how == "noisy" else ""
    return f"the rows of each label{noise} and training metrics) left the\nsilo; the rows of each label stand above."


def llm_card(config: Config, summary: Mapping[str, Any], merged: bool = False) -> str:
    """The card of the enhanced LLM: its adapter, or the whole model."""
    whole = merged or config.llm.adapter == "full"
    hub_id = _hub_id(config.llm.model)
    data = ModelCardData(
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=hub_id,
        model_name=f"{config.name}-llm",
    )
    measures = [
        (title, *(f"{summary['llm'][key][moment]:.3f}" for moment in ("before", "after")))
        for key, title in MEASURES.items()
        if None not in (summary["llm"].get(key, {}).get(moment) for moment in ("before", "after"))
    ]
    judges = len(set(clients_of(summary)) - _without_a_say(summary))
    prompts = [(label, f"`{prompt}`") for label in config.task.labels for prompt in config.task.prompt[label]]
    return f"""---
{data.to_yaml()}
---

# {config.name}: the enhanced language model

{_use_of_llm(whole, hub_id or "BASE MODEL")}

It learned from the opinions of {judges} classifiers about its own text ({PAPER}, Eq. 5 to 9).
It never read private text.
{_trimmed(config, whole)}
Labels and the prompts that it was trained on:

{_table(("label", "prompt"), prompts)}

## Training

| | |
| --- | --- |
| base model | {shown(config.llm.model)} |
| licence of the base model | {_licence(config.llm.model)} |
| trained | {"all weights" if config.llm.adapter == "full" else f"LoRA of rank {config.llm.lora_rank}"} |
| preset | {config.preset} |
| seed | {config.seed} |
| learning rate | {config.llm.learning_rate} |
| gammas of Eq. 9 | {config.llm.gamma_generation}, {config.llm.gamma_language_modeling}, {config.llm.gamma_kl} |
| weight of the divergence on the original LLM's own texts (`llm.gamma_anchor`) | {config.llm.gamma_anchor} |
| share of what it learned that it keeps (`llm.interpolation`) | {config.llm.interpolation} |
| tokens written | {summary["tokens_generated"]:,} |
| versions | {_versions(summary)} |

## Measures

{_table(("measure", "before", "after"), measures)}

## Privacy

The adapter follows classifiers that were fitted to private text, {guarantee(summary, uploaded(summary))}
"""


def dataset_card(config: Config, counts: Mapping[str, int], summary: Mapping[str, Any]) -> str:
    """The card of the synthetic text as a data set.

    Args:
        config: of the run.
        counts: rows of each of its parts, as in the folder ``data``.
        summary: what ``summary.json`` holds.
    """
    parts = [(f"`{name}`", f"{count:,}", PARTS[name]) for name, count in counts.items()]
    data = DatasetCardData(
        task_categories=["text-classification"],
        tags=[*TAGS, "synthetic"],
        pretty_name=f"{config.name}: synthetic text",
        configs=[
            {"config_name": name, "data_files": f"data/{name}.parquet", "default": place == 0}
            for place, name in enumerate(counts)
        ],
    )
    return f"""---
{data.to_yaml()}
---

# {config.name}: synthetic text

Written by a language model ({shown(config.llm.model)}; licence: {_licence(config.llm.model)}) to prompts for the labels
{_listed(config.task.labels)}, in a run of {PAPER}, preset {config.preset}, seed {config.seed}. No row was copied from a
silo. A label is what the model was asked for; nobody has checked that the text is of it.

{_table(("part", "rows", "what"), parts)}

```python
from datasets import load_dataset

texts = load_dataset("FOLDER OR REPOSITORY", "all", split="train")
```

{_table(("column", "what"), COLUMNS)}

## Privacy

The texts are a language model's, but which of them got a high reward depends on classifiers that were fitted to
private text, {guarantee(summary, uploaded(summary))}
"""


def _use_of_llm(whole: bool, base: str) -> str:
    if whole:
        return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER OR REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("FOLDER OR REPOSITORY")
```"""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "FOLDER OR REPOSITORY")
```"""


def _trimmed(config: Config, whole: bool) -> str:
    if not config.llm.vocabulary_texts:
        return ""
    if whole:
        return "\nIts vocabulary was trimmed to what the task needs (`llm.vocabulary_texts`).\n"
    return """
It was trained on a copy of the base model with a trimmed vocabulary (`llm.vocabulary_texts`). It fits the whole base
model too, with that model's own tokenizer; a tokenizer in this folder is the trimmed copy's.
"""


def _hub_id(model: str) -> str | None:
    """A name that other people can look up: a hub id, and no folder of this machine."""
    local = model.startswith((".", "/", "~", PREFIX)) or model.count("/") > 1 or Path(model).is_dir()
    return None if local else model


def shown(model: str) -> str:
    """A model's name without the folders of this machine."""
    return model if _hub_id(model) or model.startswith(PREFIX) else f"{Path(model).name} (a local folder)"


def _licence(model: str) -> str:
    package = PACKAGES.get(model.removeprefix(PREFIX))
    return package.licence if package else "see its own card"


def _results(config: Config, client: str, accuracy: float | None) -> list[EvalResult] | None:
    if accuracy is None:
        return None
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type="private",
            dataset_name=f"test text of {config.name}, {client}",
            metric_type="accuracy",
            metric_value=round(accuracy, 4),
        )
    ]


def _layers(spec: Mapping[str, Any]) -> str:
    if spec["model"] is None:
        return f"of the type {spec['type']}; its name is known at the silo"
    layers = spec.get("num_hidden_layers")
    pooled = ", mean of its tokens" if spec.get("pooling") else ""
    return shown(str(spec["model"])) + (f", lowest {layers} layers" if layers else "") + pooled


def _versions(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in summary["versions"].items())


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
