"""Who should judge what the LLM learns: the SLMs alone, or the original LLM beside them (`reward.llm_judges`)?

    python benchmarks/rewards.py sst2 --data-dir DIR --set slm.weigh_judges=true
    python benchmarks/rewards.py sst2 --data-dir DIR --set slm.weigh_judges=true --set data.alpha=0.1 --name sst2-0.1

Steps 1 to 4 under preset recommended, once with either judge: the LLM learns from each arrival, and no SLM gets
anything back. Then the LLM in the end, and with the share of what it has learned that `llm.interpolation` keeps, on the
validation rows of the task: how well it classifies them (Eq. 1, `nlu`), how often an independent judge agrees with the
label of what it writes (`judge`), how varied that is (`distinct_2`), and its perplexity on the validation part of the
Penn Treebank, which must lie beside the task's folder. Of each arrival: on which share of the texts the LLM learned
from the sign of the reward is as that judge has it. The gate probes with the original's texts alone, without what
earlier arrivals wrote. Written to benchmarks/results/rewards-NAME.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, provenance

from crosslm import evaluate
from crosslm.client import Client
from crosslm.config import Config
from crosslm.config_file import load
from crosslm.errors import QuarantineError
from crosslm.federation.local import arrival_order
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder, resolve_device
from crosslm.runs.llm_cache import CachedLLM, CachedServer, LLMCache
from crosslm.runs.loaded import load_models
from crosslm.runs.preparation import Prepared, prepare
from crosslm.server import Server, StepRecord, receive_slm
from crosslm.support.progress import Progress
from crosslm.support.quiet import quiet_libraries
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task

VALIDATION = ("data.test=validation.csv", "evaluation.perplexity_text=../ptb/ptb.valid.txt")
JUDGES = {"SLMs": False, "SLMs and the original LLM": True}


class Study:
    """Steps 1 to 4 with one of the judges, and what comes of it."""

    def __init__(self, config: Config, prepared: Prepared, judge: SLM, llm_cache: Path | None) -> None:
        self.config, self.prepared, self.judge = config, prepared, judge
        cache = LLMCache(llm_cache) if llm_cache else None
        loaded = load_models(config, prepared, cache_folder(), Progress(), Client, cache)
        self.llm, self.clients = loaded.llm, {client.id: client for client in loaded.clients}
        make_server = CachedServer if isinstance(loaded.llm, CachedLLM) else Server
        self.server = make_server(config, Task.from_config(config.task), loaded.llm, loaded.encoder)
        seed = seed_for(config.seed, "base")
        base = synthesize(self.llm, self.server.task, config.synthesis, evaluate.base_texts(config), seed)
        self.server.begin(base, prepared.public)

    def arrivals(self) -> list[dict[str, object]]:
        """Steps 1 to 4 for all clients; nothing of those that the gate refuses."""
        config, server, found = self.config, self.server, []
        for who in arrival_order(list(self.clients), config.federation.participations, config.seed):
            upload, record = self.clients[who].train(), StepRecord()
            slm = receive_slm(upload, server.task, config)
            try:
                if server.gate:
                    server.gate.judge(slm, upload)
            except QuarantineError as error:
                print(error, flush=True)
                continue
            server.learn(slm, upload, record)
            server.steps += 1
            server.remember(upload)
            drafts, rewards = record.drafts[-1]
            fits = self.judge.predict_proba(drafts.texts).argmax(dim=1) == drafts.labels
            found.append({"client": who, "right": ((rewards > 0) == fits).float().mean().item()})
            print(found[-1], flush=True)
        return found

    def figures(self, share: float) -> dict[str, float]:
        """All that is measured of the LLM with a share of what it has learned."""
        config, task = self.config, self.server.task
        rows = evaluate.nlu_rows(config, self.prepared.split.test)
        assert self.prepared.perplexity_text is not None
        with self.llm.interpolated(share):
            texts = synthesize(self.llm, task, config.synthesis, config.evaluation.nlg_samples, seed_for(0, "scale"))
            return {
                "nlu": evaluate.nlu_accuracy(self.llm, task, rows, Progress(), f"{share:g}"),
                "judge": evaluate.label_agreement(self.judge, texts),
                "distinct_2": evaluate.distinct_ngrams(texts.texts),
                "perplexity": self.llm.perplexity(self.prepared.perplexity_text, config.evaluation.perplexity_tokens),
            }


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="as crosslm run takes it")
    parser.add_argument("--data-dir")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--name", help="of the result; the task's without it")
    parser.add_argument("--llm-cache", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    origin = provenance()
    given = load(arguments.config, (*VALIDATION, *arguments.set), arguments.data_dir)
    given = given.model_copy(update={"device": resolve_device(given.device)})
    prepared = prepare(given, cache_folder(), print)
    folder = model_folder(given.slm.models[0].model, cache_folder(), print)
    judge = evaluate.train_judge(evaluate.load_judge(folder, given), given, prepared.split.judge, Progress())
    variants = {}
    for name, asked in JUDGES.items():
        config = given.model_copy(update={"reward": given.reward.model_copy(update={"llm_judges": asked})})
        study = Study(config, prepared, judge, arguments.llm_cache)
        original = study.figures(0.0)
        arrivals, shares = study.arrivals(), (config.llm.interpolation, 1.0)
        variants[name] = {"arrivals": arrivals, "shares": {f"{share:g}": study.figures(share) for share in shares}}
        print(name, variants[name], flush=True)
    about = {"task": given.name, "alpha": given.data.alpha, "seed": given.seed, "set": arguments.set}
    keep(f"rewards-{arguments.name or given.name}", {**origin, **about, "original": original, "variants": variants})


if __name__ == "__main__":
    main()
