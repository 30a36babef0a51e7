"""Which texts should step 5 learn from, and how long? Those of the trained LLM, the original's, or both?

    python benchmarks/step_5_texts.py RUN --test validation.csv    # of `crosslm run`, measured on these rows
    python benchmarks/step_5_texts.py RUN --training 3,1e-4,16 --training 9,1e-4,16    # epochs, learning rate, batch
    python benchmarks/step_5_texts.py RUN --variant "Data-free KD" --variant "the trained LLM's texts"    # no others

From the last checkpoint of a run under preset recommended: all uploads, and the LLM as it is in the end, beside the
original. Each upload is trained once, in each of the ways that are named, on each of

- Data-free KD: the original LLM's texts, judged by the SLMs and the original LLM;
- the trained LLM's texts, judged by the SLMs and the trained LLM;
- the original's texts, judged by the SLMs and the trained LLM;
- half of each, judged by the SLMs and the trained LLM: step 5 in the end (``federation.closing``);
- the last two with the LLM between the two, `--share` of the way from the original (as `llm.interpolation` takes it),
  in place of the trained one;
- twice as many texts: both pools whole, and two pools of the original's or of the trained LLM's;
- what the LLM wrote when each of the SLMs arrived, judged by the trained LLM: as many texts of it as of any pool, and
  all of it.

All SLMs judge, as they do in the end. Said of each pool: how often its judges find the label that the run's independent
judge finds. Written to benchmarks/results/step-5-texts-TASK.json when all is done; what the LLM wrote and said and each
figure is kept in RUN/step-5-texts, so that the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, provenance

from crosslm.classification import class_probabilities
from crosslm.client import Client
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.enhancement import pool_rewards, probe_of, select, soft_labels, train_on_synthetic, weigh_judges
from crosslm.federation.messages import decode_upload
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, resolve_device
from crosslm.records import SyntheticSet, Upload
from crosslm.runs import snapshot
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.loaded import load_models
from crosslm.runs.preparation import prepare
from crosslm.runs.rundir import RunDir
from crosslm.server import Server, receive_slm
from crosslm.support.progress import Progress
from crosslm.support.quiet import quiet_libraries
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task
from crosslm.teachers import as_rewarding

VARIANTS = {
    "Data-free KD": [("original", "original", 1.0)],
    "the trained LLM's texts": [("trained", "trained", 1.0)],
    "the original's, judged by the trained": [("original", "trained", 1.0)],
    "half of each, judged by the trained": [("trained", "trained", 0.5), ("original", "trained", 0.5)],
    "the original's, judged by the one between": [("original", "between", 1.0)],
    "half of the one between and of the original": [("between", "between", 0.5), ("original", "between", 0.5)],
    "all of both, judged by the trained": [("trained", "trained", 1.0), ("original", "trained", 1.0)],
    "Data-free KD with twice the texts": [("original", "original", 1.0), ("more", "original", 1.0)],
    "the trained LLM's, twice the texts": [("trained", "trained", 1.0), ("trained anew", "trained", 1.0)],
    "a part of what was written at each arrival": [("arrivals", "trained", 0.0)],
    "all that was written at arrivals": [("arrivals", "trained", 1.0)],
}
"""Whose pool, which LLM judges it, and how much of it; 0: as many texts as of any other."""
PURPOSES = {"original": "base", "more": "more", "between": "closing", "trained": "closing", "trained anew": "more"}
"""The seed that each LLM writes with is drawn for."""


class Training(NamedTuple):
    """How step 5 trains (``slm.synthetic``)."""

    epochs: int
    learning_rate: float
    batch_size: int

    @classmethod
    def read(cls, given: str) -> "Training":
        """``EPOCHS,LEARNING_RATE,BATCH_SIZE``."""
        epochs, rate, size = given.split(",")
        return cls(int(epochs), float(rate), int(size))

    def __str__(self) -> str:
        return f"{self.epochs} epochs in batches of {self.batch_size}, {self.learning_rate:g}"

    def of(self, config: Config) -> Config:
        """A configuration with it."""
        synthetic = config.slm.synthetic.model_copy(update=self._asdict())
        return config.model_copy(update={"slm": config.slm.model_copy(update={"synthetic": synthetic})})


class Study:
    """A run's last checkpoint, and what the LLM writes and says before and after it."""

    def __init__(self, run: Path, pool: int, share: float, test: str | None, variants: list[str]) -> None:
        config = load(run / "config.toml", over={"data": {"test": test}} if test else {})
        self.config = config.model_copy(update={"device": resolve_device(config.device)})
        self.task, self.pool, self.work = Task.from_config(config.task), pool, run / "step-5-texts"
        self.shares = {"original": 0.0, "more": 0.0, "between": share, "trained": 1.0, "trained anew": 1.0}
        self.variants = {name: VARIANTS[name] for name in variants}
        self.asked = list(dict.fromkeys((pool, llm) for parts in self.variants.values() for pool, llm, _ in parts))
        self.work.mkdir(exist_ok=True)
        self.run = RunDir.open(run)
        prepared = prepare(self.config, cache_folder(), print)
        loaded = load_models(self.config, prepared, cache_folder(), Progress(), Client)
        self.tests = prepared.split.tests
        self.server = Server(self.config, self.task, loaded.llm, loaded.encoder)
        checkpoints = Checkpoints(self.run)
        record = checkpoints.last()
        state, get = record["state"], checkpoints.get
        kept = snapshot.texts_of(get(state["kept"]["base_pool"]))
        if len(kept.samples) == pool:  # the run has written and asked it
            self._texts("original", lambda: kept)
            known = json.loads(get(state["kept"]["base_said"]))
            if known and len(known) == pool:
                self._kept("original-by-original", lambda: torch.tensor(known))
        counted = state["steps"], state["taught"]
        snapshot.restore_server(self.server, get(record["adapter"]), get(state["optimizer"]), *counted)
        snapshot.restore_teachers(self.server, state["teachers"], get)
        pools = list(dict.fromkeys(["original", *(pool for pool, _ in self.asked)]))
        self.pools = {name: self._texts(name, partial(self._write, name)) for name in pools}
        self.said = {(pool, llm): self._said(pool, llm) for pool, llm in self.asked}
        self.of_probe = {llm: self._said("original", llm) for llm in dict.fromkeys(llm for _, llm in self.asked)}
        self.judged = {name: self._opinion(name, pool.texts) for name, pool in self.pools.items()}
        judge = SLM.from_state(snapshot.slm_state(get(state["kept"]["judge"])), self.task.labels, self.config.device)
        self.found = {name: judge.predict_proba(pool.texts).argmax(dim=1) for name, pool in self.pools.items()}
        self.uploads = [decode_upload(get(name)) for name in state["journal"]["first"].values()]

    def _write(self, name: str) -> SyntheticSet:
        if name == "arrivals":
            pools = [
                self.run.synthetic(f"step-{step + 1:04}-pool", self.task.labels) for step in range(self.server.steps)
            ]
            return SyntheticSet(
                [sample for of_all in zip_longest(*(pool.samples for pool in pools)) for sample in of_all if sample]
            )
        seed = seed_for(self.config.seed, PURPOSES[name])
        with self.server.llm.interpolated(self.shares[name]):
            return synthesize(self.server.llm, self.task, self.config.synthesis, self.pool, seed)

    def _texts(self, name: str, write: Callable[[], SyntheticSet]) -> SyntheticSet:
        path = self.work / f"{self._file(name)}-{self.pool}.json"
        if not path.exists():
            path.write_bytes(snapshot.texts_bytes(write()))
            print(f"{name}: written", flush=True)
        return snapshot.texts_of(path.read_bytes())

    def _file(self, llm: str) -> str:
        return f"{llm}-{self.shares[llm]:g}" if llm == "between" else llm

    def _said(self, pool: str, llm: str) -> Tensor:
        def asked() -> Tensor:
            with self.server.llm.interpolated(self.shares[llm]):
                return class_probabilities(self.server.llm, self.task, self.pools[pool].texts)

        return self._kept(f"{self._file(pool)}-by-{self._file(llm)}", asked)

    def _opinion(self, pool: str, texts: list[str]) -> Tensor:
        """The mean of all who judge."""

        def asked() -> Tensor:
            members = self.server.teachers.members.values()
            found = [(each, each.slm.predict_proba(texts)) for each in members]
            opinions = [as_rewarding(each.slm, one, each.upload, self.config.reward) for each, one in found]
            return torch.stack(opinions).mean(dim=0)

        return self._kept(f"{self._file(pool)}-by-slms", asked)

    def _kept(self, name: str, ask: Callable[[], Tensor]) -> Tensor:
        path = self.work / f"{name}-{self.pool}.safetensors"
        if not path.exists():
            save_file({"probabilities": ask().contiguous()}, path)
            print(f"{name}: asked", flush=True)
        return load_file(path)["probabilities"]

    def agreement(self, pool: str, llm: str) -> float:
        """Share of a pool's texts for which its judges find the independent judge's label."""
        targets = self._targets(pool, llm)
        return (targets.argmax(dim=1) == self.found[pool]).float().mean().item()

    def _targets(self, pool: str, llm: str) -> Tensor:
        probe = probe_of(self.pools["original"], self.config)
        weight = weigh_judges(probe, self.judged["original"], self.of_probe[llm])
        targets = soft_labels(self.pools[pool], self.judged[pool], self.said[pool, llm], self.config.slm, weight)
        if targets is None:
            sys.exit("step 5 of this run has no soft labels; give one of preset recommended")
        return targets

    def accuracy(self, upload: Upload, texts: str, training: Training) -> float:
        """Of an upload that has learned from a variant's texts, in one way; kept."""
        path = self.work / f"learned-{self.pool}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        key = f"{upload.client_id}: {texts}: {training}: {self.config.data.test}: {self.shares['between']:g}"
        if key not in known:
            known[key] = self._learned(upload, self.variants[texts], training)
            path.write_text(json.dumps(known, indent=1))
            print(f"{key}: {known[key]:.3f}", flush=True)
        return float(known[key])

    def _learned(self, upload: Upload, parts: list[tuple[str, str, float]], training: Training) -> float:
        samples, targets, said, judged = [], [], [], []
        for pool, llm, share in parts:
            count = round(share * len(self.pools[pool].samples)) or self.pool
            samples += self.pools[pool].samples[:count]
            targets.append(self._targets(pool, llm)[:count])
            said.append(self.said[pool, llm][:count])
            judged.append(self.judged[pool][:count])
        config = training.of(self.config)
        texts, slm = SyntheticSet(samples), receive_slm(upload, self.task, config)
        rewards = pool_rewards(texts, torch.cat(judged), torch.cat(said))
        _, kept = select(texts, rewards, self.server.encoder, config.selection, torch.cat(said))
        train_on_synthetic(slm, texts, kept, torch.cat(targets), upload, config, Progress(), upload.client_id)
        return slm.accuracy(self.tests[upload.client_id])


def main() -> None:
    """Measure a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pool", type=int, default=768, help="texts of each LLM")
    parser.add_argument("--share", type=float, default=0.7, help="of the way from the original to the trained LLM")
    parser.add_argument("--test", help="file of rows in place of the run's own")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="what to learn from (not named: all)")
    parser.add_argument("--training", action="append", type=Training.read, help="EPOCHS,LEARNING_RATE,BATCH_SIZE")
    arguments = parser.parse_args()
    quiet_libraries()
    variants = arguments.variant or list(VARIANTS)
    study = Study(arguments.run, arguments.pool, arguments.share, arguments.test, variants)
    synthetic = study.config.slm.synthetic
    trainings = arguments.training or [Training(synthetic.epochs, float(synthetic.learning_rate), synthetic.batch_size)]
    figures = {
        **provenance(),
        "task": study.config.name,
        "seed": study.config.seed,
        "test": study.config.data.test,
        "rows": len(next(iter(study.tests.values()))),
        "pool": arguments.pool,
        "share": arguments.share,
        "weigh_judges": study.config.weighs_judges,
        "agreement": {
            f"the texts of the {pool}, by the {llm}".replace("between", "one between"): study.agreement(pool, llm)
            for pool, llm in study.asked
        },
        "clients": {},
    }
    for upload in study.uploads:
        row = {"Standalone": receive_slm(upload, study.task, study.config).accuracy(study.tests[upload.client_id])}
        for training in trainings:
            row |= {f"{name}; {training}": study.accuracy(upload, name, training) for name in study.variants}
        figures["clients"][upload.client_id] = row
    keep(f"step-5-texts-{study.config.name}", figures)


if __name__ == "__main__":
    main()
