"""How much should the SLMs' judgement and the LLM's count (`slm.weigh_judges`)?

    python benchmarks/judges.py RUN    # of preset recommended, with its checkpoints; measured on validation rows
    python benchmarks/judges.py RUN --rows 200

From the last checkpoint of a run: all uploads, and the LLM as it is in the end, beside the original. As step 5 puts
them together they judge the first validation rows of the task, whose labels are known here: what it would have an SLM
learn, if the LLM wrote such texts. For each one of the SLMs, each two and all of them, with the LLM: the share of rows
for which they find the label, where both count alike and where they are weighed; of several choices of SLMs the mean
and the worst. Written to benchmarks/results/judges-TASK.json.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, provenance

from crosslm.algorithm.soft_labels import opinion_pool, weight_beside, without_preference
from crosslm.classification import class_probabilities
from crosslm.client import Client
from crosslm.config_file import load
from crosslm.enhancement import PROBED
from crosslm.models.sources import cache_folder, resolve_device
from crosslm.records import SyntheticSet
from crosslm.runs import snapshot
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.loaded import load_models
from crosslm.runs.preparation import prepare
from crosslm.runs.rundir import RunDir
from crosslm.server import Server
from crosslm.support.progress import Progress
from crosslm.support.quiet import quiet_libraries
from crosslm.task import Task
from crosslm.teachers import as_rewarding

Figures = dict[str, float]


class Judges:
    """What the SLMs and both LLMs of a run make of the original LLM's texts and of labelled rows."""

    def __init__(self, run: Path, rows: int) -> None:
        config = load(run / "config.toml", over={"data": {"test": "validation.csv"}})
        config = config.model_copy(update={"device": resolve_device(config.device)})
        task = Task.from_config(config.task)
        prepared = prepare(config, cache_folder(), print)
        loaded = load_models(config, prepared, cache_folder(), Progress(), Client)
        server = Server(config, task, loaded.llm, loaded.encoder)
        checkpoints = Checkpoints(RunDir.open(run))
        record = checkpoints.last()
        if record is None or record["state"] is None or config.reward.teachers == 1:
            sys.exit(f"{run}: give a run of preset recommended, with its checkpoints")
        state, get = record["state"], checkpoints.get
        base = snapshot.texts_of(get(state["kept"]["base_pool"]))
        self.probe = SyntheticSet(base.samples[:PROBED])
        test = prepared.split.test
        self.texts, self.truth = list(test.texts[:rows]), torch.tensor(test.labels[:rows])
        self.llms = {"original": self._read(server)}
        snapshot.restore_server(
            server, get(record["adapter"]), get(state["optimizer"]), state["steps"], state["taught"]
        )
        snapshot.restore_teachers(server, state["teachers"], get)
        self.llms["trained"] = self._read(server)
        self.slms = [
            tuple(
                as_rewarding(each.slm, each.slm.predict_proba(texts), each.upload, config.reward)
                for texts in (self.probe.texts, self.texts)
            )
            for each in server.teachers.members.values()
        ]
        self.config = config

    def _read(self, server: Server) -> tuple[Tensor, Tensor]:
        """The LLM's judgement of the probe and of the rows, freed of its preference as in step 5."""
        found = (class_probabilities(server.llm, server.task, texts) for texts in (self.probe.texts, self.texts))
        of_probe, of_rows = (without_preference(each) for each in found)
        return of_probe, of_rows

    def right(self, probabilities: Tensor) -> float:
        """Share of the rows for which this finds the label."""
        return float((probabilities.argmax(dim=1) == self.truth).float().mean())

    def together(self, llm: str, count: int) -> Figures:
        """Each choice of so many SLMs, beside an LLM."""
        of_probe, of_rows = self.llms[llm]
        alone, alike, weighed = [], [], []
        for chosen in itertools.combinations(self.slms, count):
            probed, found = (torch.stack(each).mean(dim=0) for each in zip(*chosen, strict=True))
            alone.append(self.right(found))
            alike.append(self.right(opinion_pool(found, of_rows)))
            weight = weight_beside(probed, of_probe, self.probe.labels)
            weighed.append(self.right(opinion_pool(found, of_rows, weight)))
        named = {"SLMs alone": alone, "alike": alike, "weighed": weighed}
        means = {name: sum(values) / len(values) for name, values in named.items()}
        return means | {f"{name}, worst": min(values) for name, values in named.items()}


def main() -> None:
    """Measure a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    arguments = parser.parse_args()
    quiet_libraries()
    origin, judges = provenance(), Judges(arguments.run, arguments.rows)
    counts = sorted({1, 2, len(judges.slms)} & set(range(1, len(judges.slms) + 1)))
    figures = {
        llm: {"LLM alone": judges.right(judges.llms[llm][1])}
        | {str(count): judges.together(llm, count) for count in counts}
        for llm in judges.llms
    }
    print(json.dumps(figures, indent=1))
    about = {"task": judges.config.name, "seed": judges.config.seed, "rows": len(judges.texts)}
    keep(f"judges-{judges.config.name}", origin | about | {"probe": len(judges.probe.samples), "figures": figures})


if __name__ == "__main__":
    main()
