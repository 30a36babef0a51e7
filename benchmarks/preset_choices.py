"""What each field that the presets differ in, or might, does on SST-2 with real weights.

    python benchmarks/preset_choices.py RUN    # RUN: a finished `crosslm run sst2 --set preset=paper`

Step 5's fields are compared on the SLMs that the run's clients uploaded (trained again from the same
seed) and on the pools that the run kept. Step 4's reduction is compared by one update of the original
LLM from the run's base pool and the first client's rewards. Each cell is written when it is done to
benchmarks/results/preset-choices.json and skipped when it is there.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, keep, provenance

from crosslm import evaluate
from crosslm.client import Client
from crosslm.config import Config, load
from crosslm.data import load_split
from crosslm.experiment import client_specs
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder, resolve_device
from crosslm.progress import Progress
from crosslm.records import SyntheticSet, SyntheticText, Upload
from crosslm.seeding import seed_for
from crosslm.server import Server, receive_slm, select, slm_rewards
from crosslm.synthesis import synthesize
from crosslm.task import Task

# name: correct_prior, nonpositive_rewards, class_balance
VARIANTS = {
    "paper": (False, "keep", False),
    "correct_prior": (True, "keep", False),
    "nonpositive_rewards = drop": (False, "drop", False),
    "class_balance": (False, "keep", True),
    "all three": (True, "drop", True),
}
NAME = "preset-choices"


def read_texts(path: Path, task: Task) -> SyntheticSet:
    """Texts that a run kept."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return SyntheticSet(
        [
            SyntheticText(
                row["text"],
                task.labels.index(row["label"]),
                row["prompt"],
                tuple(row["prompt_ids"]),
                tuple(row["completion_ids"]),
                row["seed"],
            )
            for row in rows
        ]
    )


class Bench:
    """The parts of the run, loaded again."""

    def __init__(self, run: Path) -> None:
        config = load(run / "config.toml")
        self.config: Config = config.model_copy(update={"device": resolve_device(config.device)})
        self.run, self.task = run, Task.from_config(config.task)
        self.cache = cache_folder()
        self.split = load_split(self.config)
        self.specs = client_specs(self.config, list(self.split.private))
        self.judge = evaluate.train_judge(
            self.folder(self.config.slm.models[0].model), self.config, self.split.judge, Progress()
        )
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.pools = {step["client"]: f"step-{step['step']:04}-pool" for step in steps if step["event"] == "step"}

    def folder(self, name: str) -> str:
        """Where a model is."""
        return model_folder(name, self.cache)

    def upload(self, client_id: str) -> Upload:
        """What this client uploaded first: the same seed gives the same."""
        spec, slm = self.specs[client_id], self.config.slm
        seed = seed_for(self.config.seed, "head", client_id)
        model = SLM.load(
            self.folder(spec.model),
            self.task.labels,
            slm.max_length,
            seed,
            spec.num_hidden_layers,
            slm.freeze_embeddings,
        )
        return Client(client_id, self.split.private[client_id], model, slm.private, self.config.seed).train()

    def selection(self, client_id: str) -> dict:
        """Step 5 under each variant."""
        upload = self.upload(client_id)
        pool = read_texts(self.run / "synthetic" / f"{self.pools[client_id]}.jsonl", self.task)
        vectors = SentenceEncoder(self.folder(self.config.selection.encoder)).encode(pool.texts)
        encoder = SimpleNamespace(encode=lambda texts: vectors)
        standalone = receive_slm(upload, self.task, self.config).accuracy(self.split.tests[client_id])
        cells = {}
        for name, (corrected, nonpositive, balanced) in VARIANTS.items():
            slm = receive_slm(upload, self.task, self.config)
            rewards = slm_rewards(slm, pool, upload, self.config.reward.model_copy(update={"correct_prior": corrected}))
            choice = self.config.selection.model_copy(
                update={"nonpositive_rewards": nonpositive, "class_balance": balanced}
            )
            _, kept = select(pool, rewards, encoder, choice)
            slm.fit(pool.examples(kept), self.config.slm.synthetic, seed_for(self.config.seed, "choices"))
            agreement = evaluate.label_agreement(self.judge, SyntheticSet([pool.samples[place] for place in kept]))
            cells[name] = {
                "accuracy": slm.accuracy(self.split.tests[client_id]),
                "judge": agreement,
                "selected": len(kept),
            }
        return {"standalone": standalone, "counts": list(upload.class_counts), "variants": cells}

    def reduction(self, reduction: str, client_id: str) -> dict:
        """One update of the original LLM with this reduction over tokens."""
        llm_config = self.config.llm.model_copy(update={"token_reduction": reduction})
        config = self.config.model_copy(update={"llm": llm_config})
        llm = LLM.load(self.folder(llm_config.model), llm_config, seed_for(config.seed, "llm"))
        upload = self.upload(client_id)
        drafts = SyntheticSet(
            read_texts(self.run / "synthetic" / "base.jsonl", self.task).samples[: llm_config.samples]
        )
        rewards = slm_rewards(receive_slm(upload, self.task, self.config), drafts, upload, config.reward)
        Server(config, self.task, llm, SimpleNamespace()).update_llm(drafts, rewards, config.seed)
        texts = synthesize(
            llm, self.task, config.synthesis, config.evaluation.nlg_samples, seed_for(config.seed, "choices")
        )
        rows = evaluate.nlu_rows(config, self.split.test)
        return {
            "judge": evaluate.label_agreement(self.judge, texts),
            "nlu": evaluate.nlu_accuracy(llm, self.task, rows, Progress(), ""),
            "distinct_2": evaluate.distinct_ngrams(texts.texts),
            "client": client_id,
        }


def main() -> None:
    """Fill the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cells", default="selection,reduction", help="which parts to run")
    parser.add_argument("--clients", help="only these clients, with commas between; all if not given")
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    figures = json.loads(path.read_text()) if path.exists() else {**provenance(), "selection": {}, "reduction": {}}
    bench = Bench(arguments.run)
    torch.manual_seed(0)
    clients = arguments.clients.split(",") if arguments.clients else list(bench.pools)
    cells = [("selection", client) for client in clients] + [("reduction", name) for name in ("sum", "mean")]
    for part, name in cells:
        if part not in arguments.cells or name in figures[part]:
            continue
        figures[part][name] = bench.selection(name) if part == "selection" else bench.reduction(name, clients[0])
        keep(NAME, figures)
        print(part, name, json.dumps(figures[part][name]), flush=True)


if __name__ == "__main__":
    main()
