"""The LLM of a finished demo as a classifier (Eq. 1) and as a teacher of step 5, beside the SLMs that judge.

    python benchmarks/llm_teacher.py RUN    # RUN: a finished `crosslm demo`

Measured on sentences that are in no file of the demo. As a classifier: the original LLM and the one after
each arrival, plain, and calibrated: the mean of its log-probabilities over texts that it wrote itself is taken off
(Zhao et al. 2021 do so with texts without content). As a teacher: each client's upload, trained on the texts selected
for it with the soft labels of the judges, of the LLM, the mean of both or their product
(``slm.llm_judges``), the label that each text was written for, or the judges' and that label together
(``slm.intended_labels``). The first client to arrive has no other
judge than itself. Written to benchmarks/results/llm-teacher.json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).parent))
from preset_choices import enhance, read_texts
from results import keep, provenance

from crosslm.algorithm.soft_labels import (
    LEAST,
    intended_label_accuracy,
    opinion_pool,
    with_intended_labels,
    without_preference,
)
from crosslm.classification import class_probabilities
from crosslm.config_file import load
from crosslm.data import demo
from crosslm.data.examples import Examples
from crosslm.enhancement import train_on_synthetic
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, resolve_device
from crosslm.records import SyntheticSet, Upload
from crosslm.runs.preparation import original_llm
from crosslm.server import receive_slm
from crosslm.support.progress import Progress
from crosslm.task import Task
from crosslm.teachers import Teachers

ROWS = 200  # of a silo


def spare_rows(cache: Path, task: Task) -> Examples:
    """Rows of all silos that come after those which the demo takes."""
    texts, labels = [], []
    for silo, ratings in demo.read_silos(demo.fetch(cache, print)).items():
        clear = demo.clear_rows(demo.shuffled(silo, ratings))
        for text, label in clear[demo.TRAIN_ROWS + demo.TEST_ROWS + demo.JUDGE_ROWS :][:ROWS]:
            texts.append(text)
            labels.append(task.labels.index(label))
    return Examples(texts, labels)


def calibrated(probabilities: Tensor, own: Tensor) -> Tensor:
    """Probabilities ``(texts, labels)`` less the mean of the logarithms of ``own``, normalised again."""
    return (probabilities.clamp_min(LEAST).log() - own.clamp_min(LEAST).log().mean(dim=0)).softmax(dim=1)


def accuracy(probabilities: Tensor, rows: Examples) -> float:
    """Share of rows whose likeliest label is theirs."""
    return (probabilities.argmax(dim=1) == torch.tensor(rows.labels)).float().mean().item()


class Study:
    """A finished demo's parts, loaded again."""

    def __init__(self, run: Path) -> None:
        config = load(run / "config.toml")
        self.run, self.config = run, config.model_copy(update={"device": resolve_device(config.device)})
        self.task = Task.from_config(self.config.task)
        self.rows = spare_rows(cache_folder(), self.task)
        self.llm = LLM.load(original_llm(self.config, cache_folder(), print), self.config.llm, 0)
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.order = [event["client"] for event in events if event["event"] == "step" and not event.get("no_say")]
        self.clients = json.loads((run / "summary.json").read_text())["clients"]
        self.teachers = Teachers(self.config.reward)

    def texts(self, name: str) -> SyntheticSet:
        """Texts that the run kept."""
        return read_texts(self.run / "synthetic" / f"{name}.jsonl", self.task)

    def classifier(self, own: Tensor) -> dict[str, float]:
        """The LLM's accuracy by Eq. 1, plain and calibrated by what it says of its own texts."""
        said = class_probabilities(self.llm, self.task, self.rows.texts)
        return {"plain": accuracy(said, self.rows), "calibrated": accuracy(calibrated(said, own), self.rows)}

    def upload(self, client: str) -> Upload:
        """What the client sent."""
        state = SLM.load_trained(str(self.run / "uploads" / client)).to_state()
        counts = tuple(self.clients[client]["rows"][label] for label in self.task.labels)
        return Upload(client, 0, counts, {}, state)

    def taught(self, client: str, arrival: int, pool: SyntheticSet, said: Tensor) -> dict[str, float]:
        """The client's SLM after step 5 with each kind of soft labels."""
        upload = self.upload(client)
        slm = receive_slm(upload, self.task, self.config)
        accuracies = {"before": slm.accuracy(self.rows)}
        judged = self.teachers.probabilities(slm, upload, pool.texts)
        lines = (self.run / "synthetic" / f"step-{arrival:04}-pool.jsonl").read_text().splitlines()
        kept = [place for place, line in enumerate(lines) if json.loads(line)["kept"]]
        labels = {"judges": judged, "LLM": said, "LLM, calibrated": without_preference(said)}
        labels["mean of judges and calibrated LLM"] = (judged + labels["LLM, calibrated"]) / 2
        labels["judges times calibrated LLM"] = opinion_pool(judged, labels["LLM, calibrated"])
        labels["intended label"] = one_hot(pool.labels, len(self.task.labels)).float()
        rho = intended_label_accuracy(judged, pool.labels)
        labels["judges and intended label"] = with_intended_labels(judged, pool.labels, rho)
        for name, soft in labels.items():
            slm = receive_slm(upload, self.task, self.config)
            train_on_synthetic(slm, pool, kept, soft, upload, self.config, Progress(), client)
            accuracies[name] = slm.accuracy(self.rows)
        self.teachers.accepted(upload, receive_slm(upload, self.task, self.config))
        return accuracies


def main() -> None:
    """Measure a finished demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", help="the commit that the run was made with, if not HEAD")
    arguments = parser.parse_args()
    study = Study(arguments.run)
    base = study.texts("base")
    figures = {
        **provenance(),
        "run_commit": arguments.commit or provenance()["commit"],
        "seed": study.config.seed,
        "rows": len(study.rows),
        "classifier": {"original": study.classifier(class_probabilities(study.llm, study.task, base.texts))},
        "teacher": {},
    }
    for arrival, client in enumerate(study.order, start=1):
        enhance(study.llm, study.run, arrival)
        pool = study.texts(f"step-{arrival:04}-pool")
        said = class_probabilities(study.llm, study.task, pool.texts)
        figures["classifier"][f"after arrival {arrival}"] = study.classifier(said)
        figures["teacher"][client] = study.taught(client, arrival, pool, said)
        print(client, json.dumps(figures["teacher"][client]), flush=True)
    keep("llm-teacher", figures)


if __name__ == "__main__":
    main()
