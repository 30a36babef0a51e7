"""What a logistic regression on a sentence encoder's vectors reaches on the rows of Table 4 and of the demo.

    python benchmarks/logistic.py --data-dir FOLDER

It is what a silo could do by itself with scikit-learn in a minute: the same private and test rows as in the kept runs,
the encoder of `selection.encoder`, scikit-learn's own settings; beside that each label counted alike
(`class_weight="balanced"`), and all silos' rows in one regression. Written to benchmarks/results/logistic.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, provenance

from crosslm.config import Config
from crosslm.config_file import load
from crosslm.data.demo import prepare_data
from crosslm.data.split import load_split
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.sources import cache_folder, model_folder, resolve_device
from crosslm.reproduce.plan import choose
from crosslm.reproduce.scale import load_scale
from crosslm.runs.baseline import logistic_regression, together
from crosslm.support.quiet import quiet_libraries


class Remembering:
    """An encoder that reads each text once: test rows are the same for every seed, pooled rows are the clients'."""

    def __init__(self, config: Config) -> None:
        folder = model_folder(config.selection.encoder, cache_folder(None))
        self.encoder, self.known = SentenceEncoder(folder, resolve_device(config.device)), {}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(texts, dimensions)``."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= zip(fresh, self.encoder.encode(fresh).cpu() if fresh else (), strict=True)
        return torch.stack([self.known[text] for text in texts])


def of_config(config: Config, encoder: Remembering) -> dict[str, dict[str, float]]:
    """Each client's accuracy by its own rows, and by all clients' rows."""
    split = load_split(config)
    of_all = logistic_regression(together(split.private), encoder)
    return {
        name: {
            "alone": logistic_regression(private, encoder)(split.tests[name]),
            "balanced": logistic_regression(private, encoder, balanced=True)(split.tests[name]),
            "together": of_all(split.tests[name]),
        }
        for name, private in split.private.items()
    }


def main() -> None:
    """Write the figures of every task and seed, and of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--scale", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    origin, scale = provenance(), load_scale(arguments.scale)
    choice = choose(scale, (), (), (), None, "test", arguments.data_dir)
    demo = load("demo", data_dir=str(prepare_data(cache_folder(None))))
    encoder = Remembering(demo)
    figures = {"demo": {"0": of_config(demo, encoder)}}
    for task in choice.tasks:
        seeds = range(scale.seeds)
        figures[task] = {str(seed): of_config(choice.config(task, "paper", seed, {}), encoder) for seed in seeds}
        print(task, json.dumps(figures[task]), flush=True)
    keep("logistic", origin | {"figures": figures})


if __name__ == "__main__":
    main()
