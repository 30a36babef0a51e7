"""A whole run in one process: clients, server, baselines, measures and the run folder."""

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

from crosslm import evaluate
from crosslm.baselines import data_free_kd
from crosslm.canaries import plant
from crosslm.client import Client
from crosslm.config import Config, SLMSpec
from crosslm.data import Split, load_split
from crosslm.errors import CrosslmError, RunError, UploadError
from crosslm.federation.exchange import serve
from crosslm.federation.local import LocalExchange
from crosslm.federation.messages import describe
from crosslm.leaks import LeakCheck
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.private_fit import PrivateTraining, require_opacus
from crosslm.models.slm import SLM, check_layers
from crosslm.models.sources import model_folder, resolve_device
from crosslm.models.tokens import load_tokenizer, verbalizer_ids
from crosslm.preparation import (
    check_models,
    class_report,
    client_specs,
    describe_spec,
    original_llm,
    perplexity_text_of,
)
from crosslm.privacy import privacy_summary
from crosslm.progress import Display, Progress
from crosslm.records import Download, SyntheticSet, Upload
from crosslm.rundir import RunDir, versions
from crosslm.seeding import seed_for
from crosslm.server import Server, StepRecord, receive_slm
from crosslm.synthesis import synthesize
from crosslm.task import Task

LLM_MEASURES = ("nlu_accuracy", "nlg_accuracy", "nlg_judge_accuracy", "distinct_2", "perplexity")

logger = logging.getLogger(__name__)


def run_local(config: Config, output: Path, cache: Path, display: Display | None = None) -> dict[str, Any]:
    """Run the method and both baselines with all clients in this process.

    Everything that can be wrong with the input is found before a model is loaded and before
    anything is written.

    Args:
        config: what to run.
        output: run folder to create.
        cache: where converted models are kept.
        display: shows progress.

    Returns:
        What ``summary.json`` holds.

    Raises:
        CrosslmError: the input is wrong, or no client could be served.
    """
    given, config = config, config.model_copy(update={"device": resolve_device(config.device)})
    progress = Progress(display)
    split = load_split(config)
    specs = client_specs(config, list(split.private))
    check_models(config, specs)
    if config.privacy.epsilon:
        require_opacus()
    perplexity_text = perplexity_text_of(config)
    RunDir.check_free(output)
    for client_id, spec in specs.items():
        check_layers(model_folder(spec.model, cache, progress.note), spec.num_hidden_layers, f"client {client_id}")
    llm_folder = original_llm(config, cache, progress.note)
    verbalizer_ids(load_tokenizer(llm_folder, config.llm.model), Task.from_config(config.task))
    run = RunDir.create(output, given)
    for warning in split.warnings:
        progress.note(f"warning: {warning}")
        run.event("warning", message=warning)
    for client_id, examples in split.private.items():
        progress.note(f"client {client_id}: {class_report(examples, config)}; {describe_spec(specs[client_id])}")
    return _Run(config, split, specs, perplexity_text, llm_folder, run, cache, progress).execute()


class _Run:
    """The state of one run; also the journal that the loop reports to."""

    def __init__(
        self,
        config: Config,
        split: Split,
        specs: dict[str, SLMSpec],
        perplexity_text: str | None,
        llm_folder: str,
        run: RunDir,
        cache: Path,
        progress: Progress,
    ) -> None:
        self.config, self.split, self.specs = config, split, specs
        self.perplexity_text, self.llm_folder = perplexity_text, llm_folder
        self.run, self.progress = run, progress
        self.task = Task.from_config(config.task)
        self.nlu_rows = evaluate.nlu_rows(config, split.test)
        self._folders: dict[str, str] = {}
        self._cache = cache
        self.accuracy: dict[str, dict[str, float]] = {"standalone": {}, "data_free_kd": {}, "crosslm": {}}
        self.standalone: dict[str, SLM] = {}
        self.tokens_generated = 0
        self.removed: dict[str, int] = {}

    def execute(self) -> dict[str, Any]:
        """Measure, run the federation, measure again, and write it all down."""
        started = time.perf_counter()
        config, run, progress = self.config, self.run, self.progress
        self.llm = LLM.load(self.llm_folder, config.llm, seed_for(config.seed, "llm"), config.device)
        self.encoder = SentenceEncoder(self._folder(config.selection.encoder), config.device)
        self.judge = evaluate.train_judge(self._folder(config.slm.models[0].model), config, self.split.judge, progress)
        judge_accuracy = self.judge.accuracy(self.split.test) if self.judge else None
        run.event("start", versions=versions(), specs={name: spec.model_dump() for name, spec in self.specs.items()})

        self.base_pool = self._synthesize(
            "original LLM", max(config.selection.pool, config.evaluation.nlg_samples), "base"
        )
        before = self._llm_measures("before")
        clients = [self._client(client_id) for client_id in self.split.private]
        server = Server(config, self.task, self.llm, self.encoder, progress)
        exchange = LocalExchange(clients, config.federation.participations, config.seed, self.failed)
        serve(exchange, server, self, exchange.exhausted)
        if not self.accuracy["crosslm"]:
            raise RunError(f"{run.path}: no client could be served; see {run.path / 'metrics.jsonl'}")

        run.save_llm(self.llm)
        after = self._llm_measures("after")
        final = self._synthesize("enhanced LLM", config.evaluation.nlg_samples, "final")
        first = SyntheticSet(self.base_pool.samples[: config.evaluation.nlg_samples])
        for moment, texts, measures in (("before", first, before), ("after", final, after)):
            measures |= self._nlg_measures(texts)
            run.event("llm", moment=moment, **measures)
        run.save_synthetic("final", self.task.labels, final)
        summary = {
            "task": config.name,
            "preset": config.preset,
            "seed": config.seed,
            "versions": versions(),
            "seconds": {name: round(value, 2) for name, value in progress.seconds.items()}
            | {"total": round(time.perf_counter() - started, 2)},
            "slm": {method: evaluate.with_mean(values) for method, values in self.accuracy.items()},
            "llm": {name: {"before": before.get(name), "after": after.get(name)} for name in LLM_MEASURES},
            "tokens_generated": self.tokens_generated,
            "texts_removed": self.removed,
            "judge_accuracy": judge_accuracy,
            "test_rows": {name: len(test) for name, test in self.split.tests.items()},
            "clients": {
                name: {
                    "model": self.specs[name].model_dump(),
                    "rows": dict(zip(self.task.labels, examples.class_counts(len(self.task.labels)), strict=True)),
                    "bytes_up": exchange.bytes_up[name],
                    "bytes_down": exchange.bytes_down[name],
                }
                for name, examples in self.split.private.items()
            },
            "privacy": privacy_summary(run.events()),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        run.summarise(summary)
        return summary

    # -- the journal of the loop -------------------------------------------------------------

    def uploaded(self, upload: Upload) -> None:
        """Measure Standalone and Data-free KD when a client comes for the first time."""
        who = upload.client_id
        self.run.event("upload", **describe(upload))
        self.run.save_upload(upload)
        if who in self.standalone:
            return
        slm = receive_slm(upload, self.task, self.config)
        self.standalone[who] = slm
        self.accuracy["standalone"][who] = slm.accuracy(self.split.tests[who])
        pool = SyntheticSet(self.base_pool.samples[: self.config.selection.pool])
        student = data_free_kd(upload, pool, self.config, self.task, self.encoder, self.progress)
        self.accuracy["data_free_kd"][who] = student.accuracy(self.split.tests[who])

    def served(self, upload: Upload, download: Download, record: StepRecord) -> None:
        """Keep what the step wrote, and measure the SLM that goes back."""
        who, step = upload.client_id, download.step
        slm = SLM.from_state(download.slm, self.config.device)
        slm.order_labels(self.task.labels)
        self.accuracy["crosslm"][who] = slm.accuracy(self.split.tests[who])
        for iteration, (drafts, rewards) in enumerate(record.drafts):
            self.run.save_synthetic(f"step-{step:04}-drafts-{iteration}", self.task.labels, drafts, rewards)
            self._count(drafts)
        self.run.save_synthetic(f"step-{step:04}-pool", self.task.labels, record.pool, receipts=record.receipts)
        self._count(record.pool)
        self.run.save_slm(who, slm)
        for number, parts in enumerate(record.updates):
            self.run.event("update", step=step, client=who, number=number, **parts)
        kept = [sample for sample, receipt in zip(record.pool.samples, record.receipts, strict=True) if receipt.kept]
        measures = {
            "slm/standalone": self.accuracy["standalone"][who],
            "slm/data_free_kd": self.accuracy["data_free_kd"][who],
            "slm/accuracy": self.accuracy["crosslm"][who],
            "reward/drafts": float(sum(rewards.mean() for _, rewards in record.drafts) / len(record.drafts)),
            "reward/pool": sum(receipt.reward for receipt in record.receipts) / len(record.receipts),
            "diversity/pool": sum(receipt.diversity for receipt in record.receipts) / len(record.receipts),
            "distinct_2/pool": evaluate.distinct_ngrams(record.pool.texts),
            **({"judge/pool": evaluate.label_agreement(self.judge, record.pool)} if self.judge else {}),
            **(
                {"judge/selected": evaluate.label_agreement(self.judge, SyntheticSet(kept))}
                if self.judge and kept
                else {}
            ),
        }
        self.run.event("step", step=step, client=who, **measures, **download.metrics)
        wanted = self.config.selection.fraction * len(record.receipts)
        if len(kept) < wanted / 2:
            message = f"client {who}: only {len(kept)} of {wanted:.0f} texts could be selected; its SLM learned little"
            self.run.event("warning", message=message)
            self.progress.note(f"warning: {message}")
        self.progress.note(
            f"step {step}: {who} {measures['slm/standalone']:.3f} -> {measures['slm/accuracy']:.3f} "
            f"(data-free KD {measures['slm/data_free_kd']:.3f}), mean reward of its pool {measures['reward/pool']:+.2f}"
        )

    def refused(self, upload: Upload, error: UploadError) -> None:
        """An upload could not be used."""
        self.failed(upload.client_id, error)

    def failed(self, client_id: str, error: Exception) -> None:
        """A client failed: an event of the run."""
        if not isinstance(error, CrosslmError):
            logger.exception("client %s failed", client_id, exc_info=error)
        self.run.event("failure", client=client_id, error=f"{type(error).__name__}: {error}")
        self.progress.note(f"client {client_id} failed: {error}")

    # -- parts -------------------------------------------------------------------------------

    def _folder(self, name: str) -> str:
        if name not in self._folders:
            self._folders[name] = model_folder(name, self._cache, self.progress.note)
        return self._folders[name]

    def _client(self, client_id: str) -> Client:
        config, spec = self.config, self.specs[client_id]
        slm = SLM.load(
            self._folder(spec.model),
            self.task.labels,
            config.slm.max_length,
            seed_for(config.seed, "head", client_id),
            spec.num_hidden_layers,
            config.slm.freeze_embeddings,
            config.device,
        )
        rows, privacy = self.split.private[client_id], config.privacy
        private = plant(rows, slm.tokenizer, len(self.task.labels), privacy.canaries, config.seed, client_id)
        training = PrivateTraining(privacy, config.federation.participations) if privacy.epsilon else None
        leaks = LeakCheck(private.texts, privacy, self.encoder) if privacy.checks_leaks else None
        return Client(client_id, private, slm, config.slm.private, config.seed, self.progress, training, leaks)

    def _synthesize(self, detail: str, count: int, purpose: str) -> SyntheticSet:
        seed = seed_for(self.config.seed, purpose)
        with self.progress.stage("generate", detail, count, "texts") as advance:
            texts = synthesize(self.llm, self.task, self.config.synthesis, count, seed, advance)
        self._count(texts)
        self.run.save_synthetic(purpose, self.task.labels, texts)
        return texts

    def _count(self, texts: SyntheticSet) -> None:
        self.tokens_generated += texts.tokens_generated
        for reason, number in texts.removed.items():
            self.removed[reason] = self.removed.get(reason, 0) + number

    def _llm_measures(self, moment: str) -> dict[str, float]:
        measures = {"nlu_accuracy": evaluate.nlu_accuracy(self.llm, self.task, self.nlu_rows, self.progress, moment)}
        if self.perplexity_text is not None:
            limit = self.config.evaluation.perplexity_tokens
            with self.progress.stage("evaluate", f"perplexity, {moment}", 1, "text") as advance:
                measures["perplexity"] = self.llm.perplexity(self.perplexity_text, limit)
                advance(1)
        return measures

    def _nlg_measures(self, texts: SyntheticSet) -> dict[str, float]:
        """The same judges before and after: the SLMs as first uploaded, and the independent one."""
        agreement = [evaluate.label_agreement(slm, texts) for slm in self.standalone.values()]
        measures = {
            "nlg_accuracy": sum(agreement) / len(agreement),
            "distinct_2": evaluate.distinct_ngrams(texts.texts),
        }
        if self.judge:
            measures["nlg_judge_accuracy"] = evaluate.label_agreement(self.judge, texts)
        return measures


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
