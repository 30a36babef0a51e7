"""How much of what an LLM has learned should it keep (`llm.interpolation`)?

    python benchmarks/interpolation.py RUN            # finished, made with --set llm.interpolation=1
    python benchmarks/interpolation.py RUN --shares 0,0.5,1

The LLM of the run, `theta_old + share * (theta - theta_old)`, on the validation rows of the run's task: how well it
classifies them (Eq. 1, `nlu`), how often the run's judge agrees with the label of what it writes (`judge`), how varied
that is (`distinct_2`), and its perplexity on the validation part of the Penn Treebank. Written to
benchmarks/results/interpolation-TASK.json, each share as it is done; shares that are there are not done again.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results import RESULTS, keep, provenance

from crosslm import evaluate
from crosslm.config_file import load
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder, resolve_device
from crosslm.runs.preparation import prepare
from crosslm.support.progress import Progress
from crosslm.support.quiet import quiet_libraries
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task

VALIDATION = {"data": {"test": "validation.csv"}, "evaluation": {"perplexity_text": "../ptb/ptb.valid.txt"}}


class Study:
    """A run's LLM, its judge, and what it is measured on."""

    def __init__(self, run: Path) -> None:
        given = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        if given["llm"].get("interpolation", 1.0) != 1:  # older runs have no such field, and the LLM as trained
            sys.exit(f"{run}: its LLM is interpolated already; make it with --set llm.interpolation=1")
        config = load(run / "config.toml", over=VALIDATION)
        self.config = config.model_copy(update={"device": resolve_device(config.device)})
        self.task = Task.from_config(config.task)
        prepared = prepare(self.config, cache_folder(), print)
        if prepared.perplexity_text is None:
            sys.exit(f"{run}: there is no Penn Treebank beside its data")
        self.text = prepared.perplexity_text
        self.rows = evaluate.nlu_rows(self.config, prepared.split.test)
        self.judge = self._judge(prepared.split.judge)
        self.llm = LLM.load_trained(prepared.llm_folder, str(run / "llm"), config.llm, self.config.device)

    def _judge(self, held_out: evaluate.Examples) -> SLM:
        folder = model_folder(self.config.slm.models[0].model, cache_folder(), print)
        return evaluate.train_judge(evaluate.load_judge(folder, self.config), self.config, held_out, Progress())

    def figures(self, share: float) -> dict[str, float]:
        """All that is measured of the LLM with a share of what it has learned."""
        count = self.config.evaluation.nlg_samples
        with self.llm.interpolated(share):
            nlu = evaluate.nlu_accuracy(self.llm, self.task, self.rows, Progress(), f"{share:g}")
            perplexity = self.llm.perplexity(self.text, self.config.evaluation.perplexity_tokens)
            seed = seed_for(0, "scale")
            texts = synthesize(self.llm, self.task, self.config.synthesis, count, seed, lambda _: None)
        return {
            "nlu": nlu,
            "judge": evaluate.label_agreement(self.judge, texts),
            "distinct_2": evaluate.distinct_ngrams(texts.texts),
            "perplexity": perplexity,
        }


def main() -> None:
    """Measure a run's LLM with each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--shares", default="0,0.3,0.5,0.7,1")
    arguments = parser.parse_args()
    quiet_libraries()
    origin, study = provenance(), Study(arguments.run)
    name = f"interpolation-{study.config.name}"
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"seed": study.config.seed, "shares": {}}
    if kept["seed"] != study.config.seed:
        parser.error(
            f"{path} is of a run with seed {kept['seed']}, and {arguments.run} has {study.config.seed}: move it away"
        )
    known = kept["shares"]
    for share in arguments.shares.split(","):
        if share in known:
            continue
        known[share] = study.figures(float(share))
        print(share, known[share], flush=True)
        about = {"task": study.config.name, "seed": study.config.seed, "rows": len(study.rows)}
        keep(name, {**origin, **about, "shares": known})


if __name__ == "__main__":
    main()
