"""What each field that the presets differ in, or might, does with real weights.

    python benchmarks/preset_choices.py RUN    # RUN: a finished `crosslm run sst2 --set preset=paper`
    python benchmarks/preset_choices.py RUN --name yahoo_answers    # RUN: one of preset recommended

Step 5's fields are compared on the SLMs that the run's clients uploaded (trained again from the same
seed) and on the pools that the run kept. Step 4's fields are compared by training the original LLM
once through all of the run's arrivals, without step 5 (`--cells update`: these alone). A run of `crosslm reproduce`
has no checkpoints any more: variants that ask the LLM of each arrival (selection.llm_posterior, slm.llm_judges) need
one of `crosslm run`; the others can be named by --variants. Each cell
is written when it is done to benchmarks/results/preset-choices.json (or preset-choices-NAME.json) and skipped when it
is there. Test rows are those of the run: for tuning let it have the validation split
(`crosslm run TASK --set data.test=validation.csv`, or `crosslm reproduce --split validation`, which keeps its runs).
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load as load_tensors

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, keep, provenance

from crosslm import evaluate
from crosslm.algorithm.rewards import label_rewards
from crosslm.classification import class_probabilities
from crosslm.client import Client
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.data.split import load_split
from crosslm.enhancement import probe_of, select, soft_labels, train_on_synthetic, weigh_judges
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder, resolve_device
from crosslm.records import SyntheticSet, SyntheticText, Upload
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.preparation import client_specs, original_llm, perplexity_text_of
from crosslm.runs.rundir import RunDir
from crosslm.server import Server, receive_slm
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task
from crosslm.teachers import Teachers

PRIOR = {"reward": {"correct_prior": True}}
BALANCE = {"selection": {"class_balance": True}}
NEARER = {"slm": {"interpolation": 0.7}}
POSTERIOR = {"selection": {"llm_posterior": True}}
TEACHERS = {"reward": {"teachers": 4}}
SOFT = {"slm": {"soft_labels": True}}
WHOLE = {"selection": {"fraction": 1.0}}
# name: sections and fields that lie over the paper's, the later over the earlier
VARIANTS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "paper": [],
    "correct_prior": [PRIOR],
    "nonpositive_rewards = drop": [{"selection": {"nonpositive_rewards": "drop"}}],
    "class_balance": [BALANCE],
    "llm_posterior": [POSTERIOR],
    "interpolation = 0.7": [NEARER],
    "teachers = 4": [TEACHERS],
    "soft_labels": [SOFT],
    "fraction = 1": [WHOLE],
    "correct_prior, class_balance": [PRIOR, BALANCE],
    "correct_prior, class_balance, interpolation = 0.7": [PRIOR, BALANCE, NEARER],
    "correct_prior, class_balance, llm_posterior, interpolation = 0.7": [PRIOR, BALANCE, POSTERIOR, NEARER],
    "correct_prior, teachers = 4, soft_labels": [PRIOR, TEACHERS, SOFT],
    "correct_prior, teachers = 4, soft_labels, fraction = 1": [PRIOR, TEACHERS, SOFT, WHOLE],
}
# whatever the run itself had of these
OURS = {
    "slm": {
        "soft_labels": True,
        "intended_labels": False,
        "llm_judges": True,
        "weigh_judges": False,
        "interpolation": 1.0,
    }
}
ALONE = {"slm": {"llm_judges": False}}
INTENDED = {"slm": {"llm_judges": False, "intended_labels": True}}
OF_RECOMMENDED: dict[str, list[dict[str, dict[str, Any]]]] = {
    "recommended": [OURS],
    "intended_labels": [OURS, {"slm": {"intended_labels": True}}],
    "weigh_judges": [OURS, {"slm": {"weigh_judges": True}}],
    "llm_judges = false": [OURS, ALONE],
    "llm_judges = false, intended_labels": [OURS, INTENDED],
    "interpolation = 0.7": [OURS, NEARER],
    "llm_judges = false, interpolation = 0.7": [OURS, ALONE, NEARER],
    "llm_judges = false, intended_labels, interpolation = 0.7": [OURS, INTENDED, NEARER],
    "soft_labels = false, interpolation = 0.7": [OURS, {"slm": {"soft_labels": False}}, NEARER],
}
UPDATES: dict[str, list[dict[str, dict[str, Any]]]] = {
    "paper": [],
    "token_reduction = mean": [{"llm": {"token_reduction": "mean"}}],
    "correct_prior, leave_one_out": [PRIOR, {"reward": {"baseline": "leave_one_out"}}],
    "correct_prior, leave_one_out, teachers = 4": [PRIOR, TEACHERS, {"reward": {"baseline": "leave_one_out"}}],
}
UPDATES_OF_RECOMMENDED: dict[str, list[dict[str, dict[str, Any]]]] = {
    "recommended": [],
    "gamma_anchor = 1": [{"llm": {"gamma_anchor": 1.0}}],
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


def enhance(llm: LLM, run: Path, arrival: int) -> None:
    """Give an LLM the adapter that it had after this arrival, from the run's checkpoint."""
    kept = Checkpoints(RunDir.open(run))
    weights = load_tensors(kept.get(kept.read(arrival)["adapter"]))
    with torch.no_grad():
        for name, parameter in llm.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])


def varied(config: Config, fields: list[dict[str, dict[str, Any]]]) -> Config:
    """The configuration with these fields of its sections changed."""
    for sections in fields:
        changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
        config = config.model_copy(update=changed)
    return config


def updates_of(config: Config) -> dict[str, list[dict[str, dict[str, Any]]]]:
    """Step 4's variants that there are under a run's preset."""
    return UPDATES if config.preset == "paper" else UPDATES_OF_RECOMMENDED


class Bench:
    """The parts of the run, loaded again."""

    def __init__(self, run: Path) -> None:
        config = load(run / "config.toml")
        self.config: Config = config.model_copy(update={"device": resolve_device(config.device)})
        self.run, self.task = run, Task.from_config(config.task)
        self.cache = cache_folder()
        self.uploads: dict[str, Upload] = {}
        self.split = load_split(self.config)
        self.specs = client_specs(self.config, list(self.split.private))
        judge = evaluate.load_judge(self.folder(self.config.slm.models[0].model), self.config)
        self.judge = evaluate.train_judge(judge, self.config, self.split.judge, Progress())
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if step["event"] == "step" and not step.get("no_say")]
        self.arrivals = {step["client"]: step["step"] for step in steps}

    def folder(self, name: str) -> str:
        """Where a model is."""
        return model_folder(name, self.cache)

    def upload(self, client_id: str) -> Upload:
        """What this client uploaded first: the same seed gives the same."""
        if client_id in self.uploads:
            return self.uploads[client_id]
        spec, slm = self.specs[client_id], self.config.slm
        seed = seed_for(self.config.seed, "head", client_id)
        model = SLM.load(
            self.folder(spec.model),
            self.task.labels,
            slm.max_length,
            seed,
            spec.num_hidden_layers,
            slm.freeze_embeddings,
            pooling=spec.pooling,
        )
        rows, accept = self.split.private[client_id], self.config.acceptance
        client = Client(client_id, rows, model, slm.private, self.config.seed, acceptance=accept)
        self.uploads[client_id] = client.train()
        return self.uploads[client_id]

    def enhanced_llm(self, arrival: int) -> LLM:
        """The LLM that wrote this arrival's pool."""
        config = self.config
        llm = LLM.load(original_llm(config, self.cache, print), config.llm, seed_for(config.seed, "llm"))
        enhance(llm, self.run, arrival)
        return llm

    def teachers(self, config: Config, arrival: int) -> Teachers:
        """Who judges beside the SLM of this arrival: those that came before it."""
        teachers = Teachers(config.reward)
        for client_id, earlier in self.arrivals.items():
            if earlier < arrival:
                upload = self.upload(client_id)
                teachers.accepted(upload, receive_slm(upload, self.task, config))
        return teachers

    def selection(self, client_id: str, variants: dict[str, list[dict[str, dict[str, Any]]]]) -> dict:
        """Step 5 under each of the variants."""
        upload = self.upload(client_id)
        arrival = self.arrivals[client_id]
        pool = read_texts(self.run / "synthetic" / f"step-{arrival:04}-pool.jsonl", self.task)
        asks = any(varied(self.config, fields).asks_llm for fields in variants.values())
        base = read_texts(self.run / "synthetic" / "base.jsonl", self.task)
        said, said_of_base = None, None
        if asks:
            llm = self.enhanced_llm(arrival)
            said, said_of_base = (class_probabilities(llm, self.task, texts.texts) for texts in (pool, base))
        found = self.judge.predict_proba(pool.texts).argmax(dim=1)
        vectors = SentenceEncoder(self.folder(self.config.selection.encoder)).encode(pool.texts)
        encoder = SimpleNamespace(encode=lambda texts: vectors)
        standalone = receive_slm(upload, self.task, self.config).accuracy(self.split.tests[client_id])
        cells = {}
        for name, fields in variants.items():
            config = varied(self.config, fields)
            teachers, slm = self.teachers(config, arrival), receive_slm(upload, self.task, config)
            judged = teachers.probabilities(slm, upload, pool.texts)
            _, kept = select(pool, label_rewards(judged, pool.labels), encoder, config.selection, said)
            probe = probe_of(base, config)
            judged_base = teachers.probabilities(slm, upload, probe.texts) if probe.samples else None
            weight = weigh_judges(probe, judged_base, said_of_base)
            targets = soft_labels(pool, judged, said, config.slm, weight)
            train_on_synthetic(slm, pool, kept, targets, upload, config, Progress(), client_id)
            agreement = evaluate.label_agreement(self.judge, SyntheticSet([pool.samples[place] for place in kept]))
            learned = pool.labels if targets is None else targets.argmax(dim=1)
            right = (learned == found)[kept].float().mean().item()
            cells[name] = {
                "accuracy": slm.accuracy(self.split.tests[client_id]),
                "judge": agreement,  # on the labels that the selected texts were written for
                "judge_of_targets": right,  # on the labels that were learned
                "selected": len(kept),
            }
        return {"standalone": standalone, "counts": list(upload.class_counts), "variants": cells}

    def update(self, name: str) -> dict:
        """The original LLM, trained through all arrivals with these fields."""
        config = varied(self.config, updates_of(self.config)[name])
        llm = LLM.load(original_llm(config, self.cache, print), config.llm, seed_for(config.seed, "llm"))
        server = Server(config, self.task, llm, SimpleNamespace())
        arrivals = []
        for step, client_id in enumerate(self.arrivals):
            seed = seed_for(config.seed, "server", step, 0)
            drafts = synthesize(server.llm, self.task, config.synthesis, config.llm.samples, seed)
            upload = self.upload(client_id)
            slm = receive_slm(upload, self.task, config)
            rewards = label_rewards(server.teachers.probabilities(slm, upload, drafts.texts), drafts.labels)
            server.update_llm(drafts, server.advantages(drafts, rewards), seed)
            server.remember(upload)
            seed = seed_for(config.seed, "choices", step)
            texts = synthesize(server.llm, self.task, config.synthesis, config.evaluation.nlg_samples, seed)
            arrivals.append(
                {
                    "client": client_id,
                    "judge": evaluate.label_agreement(self.judge, texts),
                    "distinct_2": evaluate.distinct_ngrams(texts.texts),
                }
            )
        rows = evaluate.nlu_rows(config, self.split.test)
        last = {"nlu": evaluate.nlu_accuracy(server.llm, self.task, rows, Progress(), "")}
        if (text := perplexity_text_of(config)) is not None:
            last["perplexity"] = server.llm.perplexity(text, config.evaluation.perplexity_tokens)
        return {"arrivals": arrivals, **last}


def main() -> None:
    """Fill the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cells", default="selection,update", help="which parts to run")
    parser.add_argument("--name", help="of the result, preset-choices-NAME; without it preset-choices")
    parser.add_argument("--variants", help="of step 5, with semicolons between; all if not given")
    parser.add_argument("--clients", help="only these clients, with commas between; all if not given")
    arguments = parser.parse_args()
    result = f"{NAME}-{arguments.name}" if arguments.name else NAME
    path = RESULTS / f"{result}.json"
    bench = Bench(arguments.run)
    has_checkpoints = bool(Checkpoints(RunDir.open(arguments.run)).numbers())
    data, kept = bench.config.data, path.exists()
    new = {
        **provenance(),
        "task": bench.config.name,
        "rows": [data.test, data.test_rows],
        "selection": {},
        "update": {},
    }
    figures = json.loads(path.read_text()) if kept else new
    torch.manual_seed(0)
    clients = arguments.clients.split(",") if arguments.clients else list(bench.arrivals)
    known = VARIANTS if bench.config.preset == "paper" else OF_RECOMMENDED
    names = arguments.variants.split(";") if arguments.variants else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--variants: there is no {sorted(unknown)}, but {list(known)}")
    variants = {name: known[name] for name in names}
    asking = [name for name in names if varied(bench.config, known[name]).asks_llm and not has_checkpoints]
    if asking and "selection" in arguments.cells:
        parser.error(f"{arguments.run} has no checkpoints, which {asking} need: give a run of crosslm run")
    cells = [("selection", client) for client in clients] + [("update", name) for name in updates_of(bench.config)]
    for part, name in cells:
        if part not in arguments.cells or name in figures[part]:
            continue
        figures[part][name] = bench.selection(name, variants) if part == "selection" else bench.update(name)
        keep(result, figures)
        print(part, name, json.dumps(figures[part][name]), flush=True)


if __name__ == "__main__":
    main()
