"""Accuracy and what an attacker learns, without DP and with it, on SST-2 with the real MiniLM weights.

    python benchmarks/privacy.py DATA                 # DATA: a folder with train_sentences.csv and test.csv
    python benchmarks/privacy.py DATA --rows 1000 --seeds 3

Each cell, one seed under one budget, is written to benchmarks/results/privacy-sst2.json when done, and skipped when
it is there. One silo's rows and the rows of the attacker's reference model are drawn from the training sentences; the
attack's others are the test rows, on which accuracy is measured too. The classifier's head reads the mean of the
tokens. Without DP the settings are those of the packaged configuration sst2. With DP they were chosen on
validation.csv: head only, centred, every row in every batch.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, keep, provenance

from crosslm.audit import figures_of, losses, slm_exposures
from crosslm.canaries import draw_canaries
from crosslm.config import FitConfig, PrivacyConfig
from crosslm.config_file import load
from crosslm.data import load_examples
from crosslm.models.private_fit import PrivateTraining
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder
from crosslm.records import Examples
from crosslm.seeding import seed_for

NAME = "privacy-sst2"
BUDGETS = {"none": None, "8": 8.0, "3": 3.0}
CANARIES, CANDIDATES = 8, 255
DP_EPOCHS, DP_RATE, DP_CLIP = 20, 0.1, 1.0


class Bench:
    """The data and the models of one seed."""

    def __init__(self, data: str, rows: int, seed: int) -> None:
        self.config = load("sst2", (), data)
        self.rows, self.seed, labels = rows, seed, self.config.task.labels
        self.labels = labels
        train = load_examples("train_sentences.csv", self.config.data, labels).examples
        self.test = load_examples("test.csv", self.config.data, labels).examples
        order = list(range(len(train)))
        random.Random(seed_for(seed, "privacy rows")).shuffle(order)
        self.members, self.reference_rows = train.take(order[:rows]), train.take(order[rows : 2 * rows])
        self.folder = model_folder(self.config.slm.models[0].model, cache_folder())
        self._reference_losses: torch.Tensor | None = None
        both = Examples(self.members.texts + self.test.texts, self.members.labels + self.test.labels)
        self.both = both

    def fresh(self) -> SLM:
        """The classifier before step 1."""
        config = self.config.slm
        return SLM.load(
            self.folder, self.labels, config.max_length, self.seed, None, config.freeze_embeddings, pooling="mean"
        )

    def reference_losses(self) -> torch.Tensor:
        """Of the attacker's reference model on all rows of the attack."""
        if self._reference_losses is None:
            slm = self.fresh()
            slm.fit(self.reference_rows, self.config.slm.private, self.seed)
            self._reference_losses = losses(slm, self.both.texts, self.both.labels)
        return self._reference_losses

    def cell(self, epsilon: float | None) -> dict:
        """One classifier: trained with canaries among its rows, measured, attacked."""
        slm, started = self.fresh(), time.perf_counter()
        canaries = draw_canaries(slm.tokenizer, len(self.labels), CANARIES, CANDIDATES, self.seed)
        private = Examples(self.members.texts + canaries.planted.texts, self.members.labels + canaries.planted.labels)
        if epsilon is None:
            told = slm.fit(private, self.config.slm.private, self.seed)
        else:
            fit = FitConfig(epochs=DP_EPOCHS, batch_size=len(private), learning_rate=DP_RATE, weight_decay=0.0)
            budget = PrivacyConfig(epsilon=epsilon, clip=DP_CLIP, trained_layers=0, center=True)
            secret = random.Random(seed_for(self.seed, "noise", str(epsilon)))  # repeatable: no secret
            told = PrivateTraining(budget, 1, secret).fit(slm, private, fit, self.seed, lambda _: None)
        seconds = time.perf_counter() - started
        loss, count = losses(slm, self.both.texts, self.both.labels), len(self.members)
        right = loss[count:] < torch.tensor(2.0).log()  # two labels: the more likely one
        attacks = {"loss": -loss, "calibrated": self.reference_losses() - loss}
        return {
            "epsilon": told.get("dp/epsilon"),
            "accuracy": float(right.double().mean()),
            "attacks": {name: figures_of(it[:count], it[count:], self.seed) for name, it in attacks.items()},
            "exposure": slm_exposures(slm, canaries),
            "seconds": round(seconds, 1),
        }


def main() -> None:
    """Fill the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of SST-2's CSV files")
    parser.add_argument("--rows", type=int, default=200, help="rows of the silo; the packaged configuration has 200")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = RESULTS / f"{NAME}.json"
    figures = json.loads(path.read_text()) if path.exists() else {**provenance(), "cells": {}}
    commit = provenance()["commit"]
    for seed in range(arguments.seeds):
        bench = Bench(arguments.data, arguments.rows, seed)
        for name, epsilon in BUDGETS.items():
            key = f"{arguments.rows}/{name}/{seed}"
            if key not in figures["cells"]:
                figures["cells"][key] = bench.cell(epsilon) | {"commit": commit}
                keep(NAME, figures)
                print(key, json.dumps(figures["cells"][key]), flush=True)


if __name__ == "__main__":
    main()
