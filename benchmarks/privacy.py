"""Accuracy and what an attacker learns, without DP and with it, on SST-2 with the real MiniLM weights.

    python benchmarks/privacy.py DATA                          # DATA: a folder with train_sentences.csv and test.csv
    python benchmarks/privacy.py DATA --rows 1000 --seeds 3    # more cells beside those of 200 rows
    python benchmarks/privacy.py DATA --epsilons none 8        # some of the budgets only

Each cell, one seed under one budget, is written to benchmarks/results/privacy-sst2.json when done, with the settings
and the commit it was measured with; then `python benchmarks/results.py render`. A cell that is there is skipped if
these are the same; cells of so many rows that were measured with others are thrown away, so no two kinds are mixed.

One silo's rows and the rows of the attacker's reference model are drawn from the training sentences; the attack's
others are the test rows, on which accuracy is measured too. The classifier's head reads the mean of the tokens, with
and without DP. Without DP the settings are those of the packaged configuration sst2. With DP they were chosen on
validation.csv: head only, centred, every row in every batch. The reference model is trained as the classifier that it
is compared with, without noise.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, keep, provenance

from crosslm.config import FitConfig, PrivacyConfig
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.data.texts import load_examples
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder
from crosslm.privacy.canaries import draw_canaries
from crosslm.privacy.private_fit import PrivateTraining
from crosslm.privacy.private_layers import as_under_dp
from crosslm.runs.audit import figures_of, losses, slm_exposures
from crosslm.support.seeding import seed_for

NAME = "privacy-sst2"
BUDGETS = {"none": None, "8": 8.0, "3": 3.0}
POOLING = "mean"
CANARIES, CANDIDATES = 8, 255
DP_EPOCHS, DP_RATE, DP_CLIP = 20, 0.1, 1.0


class Bench:
    """The data and the models of one seed."""

    def __init__(self, data: str, rows: int, seed: int) -> None:
        self.config = load("sst2", (), data)
        self.rows, self.seed, self.labels = rows, seed, self.config.task.labels
        train = load_examples("train_sentences.csv", self.config.data, self.labels).examples
        self.test = load_examples("test.csv", self.config.data, self.labels).examples
        order = list(range(len(train)))
        random.Random(seed_for(seed, "privacy rows")).shuffle(order)
        self.members, self.reference_rows = train.take(order[:rows]), train.take(order[rows : 2 * rows])
        self.folder = model_folder(self.config.slm.models[0].model, cache_folder())
        self.both = Examples(self.members.texts + self.test.texts, self.members.labels + self.test.labels)
        self._reference_losses: dict[bool, torch.Tensor] = {}

    def fit(self, private: bool) -> FitConfig:
        """How step 1 trains. No row is held out, or members of the attack would be none."""
        if private:
            rows = self.rows + CANARIES
            return FitConfig(epochs=DP_EPOCHS, batch_size=rows, learning_rate=DP_RATE, weight_decay=0.0)
        return self.config.slm.private.model_copy(update={"patience": 0})

    def budget(self, epsilon: float | None) -> PrivacyConfig:
        """What step 1 is trained under."""
        return PrivacyConfig(epsilon=epsilon, clip=DP_CLIP, trained_layers=0, center=True)

    def settings(self, epsilon: float | None) -> dict[str, Any]:
        """All that a cell depends on, beside its seed and the commit."""
        private, slm, budget = epsilon is not None, self.config.slm, self.budget(epsilon)
        under = {name: getattr(budget, name) for name in ("delta", "clip", "trained_layers", "center")}
        return {
            "model": slm.models[0].model,
            "pooling": POOLING,
            "max_length": slm.max_length,
            "freeze_embeddings": slm.freeze_embeddings,
            "fit": self.fit(private).model_dump(),
            "privacy": under if private else None,
            "rows": self.rows,
            "test_rows": len(self.test),
            "canaries": CANARIES,
            "reference": "trained as the classifier, without noise",
        }

    def fresh(self) -> SLM:
        """The classifier before step 1."""
        config = self.config.slm
        return SLM.load(
            self.folder, self.labels, config.max_length, self.seed, None, config.freeze_embeddings, pooling=POOLING
        )

    def reference_losses(self, private: bool) -> torch.Tensor:
        """Of the attacker's reference model on all rows of the attack."""
        if private not in self._reference_losses:
            slm, rows = self.fresh(), self.reference_rows
            if private:
                with as_under_dp(slm, rows, self.budget(None)):
                    slm.fit(rows, self.fit(private), self.seed)
            else:
                slm.fit(rows, self.fit(private), self.seed)
            self._reference_losses[private] = losses(slm, self.both.texts, self.both.labels)
        return self._reference_losses[private]

    def cell(self, epsilon: float | None) -> dict:
        """One classifier: trained with canaries among its rows, measured, attacked."""
        slm, started, fit = self.fresh(), time.perf_counter(), self.fit(epsilon is not None)
        canaries = draw_canaries(slm.tokenizer, len(self.labels), CANARIES, CANDIDATES, self.seed)
        rows = Examples(self.members.texts + canaries.planted.texts, self.members.labels + canaries.planted.labels)
        if epsilon is None:
            told = slm.fit(rows, fit, self.seed)
        else:
            secret = random.Random(seed_for(self.seed, "noise", str(epsilon)))  # repeatable: no secret
            told = PrivateTraining(self.budget(epsilon), 1, secret).fit(slm, rows, fit, self.seed, lambda _: None)
        seconds = time.perf_counter() - started
        loss, count = losses(slm, self.both.texts, self.both.labels), len(self.members)
        right = loss[count:] < torch.tensor(2.0).log()  # two labels: the more likely one
        attacks = {"loss": -loss, "calibrated": self.reference_losses(epsilon is not None) - loss}
        return {
            "epsilon": told.get("dp/epsilon"),
            "accuracy": float(right.double().mean()),
            "attacks": {name: figures_of(it[:count], it[count:], self.seed) for name, it in attacks.items()},
            "exposure": slm_exposures(slm, canaries),
            "seconds": round(seconds, 1),
        }


def still_good(cells: dict[str, dict], rows: int, commit: str, settings: dict[str, dict]) -> dict[str, dict]:
    """The cells without those of so many rows that were measured at another commit or with other settings.

    Args:
        cells: by ``rows/budget/seed``.
        rows: of those that are measured now.
        commit: now.
        settings: now, by budget.
    """

    def good(key: str, cell: dict) -> bool:
        count, budget, _ = key.split("/")
        return int(count) != rows or (cell["commit"] == commit and cell["settings"] == settings[budget])

    return {key: cell for key, cell in cells.items() if good(key, cell)}


def main() -> None:
    """Fill the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of SST-2's CSV files")
    parser.add_argument("--rows", type=int, default=200, help="rows of the silo; the packaged configuration has 200")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = RESULTS / f"{NAME}.json"
    origin = provenance()
    kept = json.loads(path.read_text())["cells"] if path.exists() else {}
    for seed in range(arguments.seeds):
        bench = Bench(arguments.data, arguments.rows, seed)
        settings = {name: bench.settings(epsilon) for name, epsilon in BUDGETS.items()}
        settings = json.loads(json.dumps(settings))  # as a file gives them back
        cells = still_good(kept, arguments.rows, origin["commit"], settings)
        if len(cells) < len(kept):
            print(f"{len(kept) - len(cells)} cells of another commit or other settings are thrown away", flush=True)
        for name in arguments.epsilons:
            key = f"{arguments.rows}/{name}/{seed}"
            if key not in cells:
                cells[key] = {**bench.cell(BUDGETS[name]), "settings": settings[name], **origin}
                keep(NAME, {"cells": cells})
                print(key, json.dumps(cells[key]), flush=True)
        kept = cells


if __name__ == "__main__":
    main()
