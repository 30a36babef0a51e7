"""A whole run in one process: clients, server, baselines, measures and the run folder.

After each arrival, before the next, everything is in a checkpoint: a run that was killed, or stopped,
goes on from there, and ends as one that never was.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosslm import evaluate
from crosslm.client import Client
from crosslm.config import Config
from crosslm.errors import RunError, StoppedError, UnservedError
from crosslm.federation.exchange import close, serve
from crosslm.federation.intake import Intake
from crosslm.federation.local import LocalExchange
from crosslm.models.dtypes import fit_dtype
from crosslm.models.slm import SLM
from crosslm.models.sources import resolve_device
from crosslm.privacy.accounting import require_opacus
from crosslm.privacy.bounds import privacy_summary, told_counts
from crosslm.runs import arrivals, snapshot
from crosslm.runs.cards import write_cards
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.journal import RunJournal
from crosslm.runs.llm_cache import CachedLLM, CachedServer, LLMCache
from crosslm.runs.loaded import Loaded, load_models
from crosslm.runs.measures import LLM_MEASURES, LLMMeter, peak_memory_bytes
from crosslm.runs.preparation import Prepared, check_same, class_report, describe_spec, prepare
from crosslm.runs.rundir import CONFIG, SUMMARY, RunDir
from crosslm.runs.tracking import tracked, wanted
from crosslm.server import Server
from crosslm.support.progress import Display, Progress
from crosslm.support.provenance import versions
from crosslm.task import Task


def run_local(
    config: Config,
    output: Path,
    cache: Path,
    display: Display | None = None,
    resume: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    make_client: Callable[..., Client] = Client,
    llm_cache: Path | None = None,
) -> dict[str, Any]:
    """Run the method and both baselines with all clients in this process.

    Everything that can be wrong with the input is found before anything is written, and all that can be
    found without the models' weights before a model is loaded.

    Args:
        config: what to run.
        output: run folder to create.
        cache: where converted models are kept.
        display: shows progress.
        resume: go on with the run that is in ``output``, if there is one.
        stop_requested: asked after each arrival whether to stop there.
        make_client: called for each client as :class:`Client` is; what it gives takes part, a client that behaves
            otherwise too.
        llm_cache: folder where what the LLM writes, reads and learns is kept, so that a run which differs from an
            earlier one only in its step 5, its test rows or ``llm.interpolation`` does of that only what is
            new (:mod:`crosslm.runs.llm_cache`).

    Returns:
        What ``summary.json`` holds.

    Raises:
        CrosslmError: the input is wrong, or no client could be served.
        StoppedError: it was asked to stop; everything done so far is kept.
    """
    given, config = config, config.model_copy(update={"device": resolve_device(config.device)})
    progress, started = Progress(display), time.perf_counter()
    goes_on = resume and (output / CONFIG).is_file()
    if goes_on:
        RunDir(output).check_in_one_process("gone on with by crosslm run")
        check_same(given, output)
        if (output / SUMMARY).is_file():
            progress.note(f"{output}: the run is complete already")
            return RunDir.open(output).summary()
    else:
        RunDir.check_free(output)
    wanted(config)
    if config.privacy.epsilon:
        require_opacus()
    prepared = prepare(config, cache, progress.note)
    kept = LLMCache(llm_cache) if llm_cache else None
    with RunDir(output).locked():
        with progress.stage("load", "LLM, sentence encoder and classifiers", 1, "set") as advance:
            loaded = load_models(config, prepared, cache, progress, make_client, kept)
            advance(1)
        run = RunDir.open(output) if goes_on else RunDir.create(output, given)
        run.note_session("resume" if goes_on else "start")
        this = _Run(config, prepared, loaded, run, progress, stop_requested, started)
        record = this.go_back()  # before the trackers count what is there; to what is damaged no event is added
        try:
            with tracked(run, given, progress.note):
                return this.execute(record)
        except BaseException as error:  # Ctrl-C too: who follows the run must know
            run.event("end", error=f"{type(error).__name__}: {error}")
            raise


class _Run:
    """The state of one run, from its beginning or from its last checkpoint to its summary."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        loaded: Loaded,
        run: RunDir,
        progress: Progress,
        stop_requested: Callable[[], bool],
        started: float,
    ) -> None:
        self.config, self.split, self.specs = config, prepared.split, prepared.specs
        self.loaded, self.llm, self.public = loaded, loaded.llm, prepared.public
        self.run, self.progress, self.stop_requested = run, progress, stop_requested
        self.checkpoints = Checkpoints(run, config.checkpoint.keep)
        self.task = Task.from_config(config.task)
        self.inputs = snapshot.inputs_digest(prepared.split, prepared.public, prepared.perplexity_text)
        self.begin_with = {client.id: snapshot.slm_digest(client.slm) for client in loaded.clients}
        rows = evaluate.nlu_rows(config, self.split.test)
        self.meter = LLMMeter(run, config, self.task, progress, rows, prepared.perplexity_text)
        self._started = started  # before the data and the models were loaded
        self._clients: dict[str, dict[str, Any]] = {}  # rounds and the name of the kept SLM, of those that arrived

    def go_back(self) -> dict[str, Any] | None:
        """Take away what was written after the last checkpoint, which is given; None where there is none yet.

        Raises:
            RunError: it is damaged, or has been pruned, or events before it are lost.
        """
        record = self.checkpoints.last()
        if record and record["state"] is None:
            raise RunError(
                f"{self.run.path}: arrival {record['arrival']} has been pruned and cannot be gone on from; run it again"
            )
        self.run.go_back(record["state"]["events"] if record else 0)
        return record

    def execute(self, record: dict[str, Any] | None) -> dict[str, Any]:
        """Measure, run the federation, measure again, and write it all down.

        Args:
            record: checkpoint to go on from; None begins.
        """
        config = self.config
        make_server = CachedServer if isinstance(self.llm, CachedLLM) else Server
        self.server = make_server(config, self.task, self.llm, self.loaded.encoder, self.progress)
        self.journal = RunJournal(config, self.split, self.run, self.checkpoints, self.server, self.progress)
        self.exchange = LocalExchange(
            self.loaded.clients,
            config.federation.participations,
            config.seed,
            self.journal.failed,
            Intake(self.task.labels, config.intake),
            self.journal.decided,
        )
        if record:
            self._restore(record)
        else:
            self._begin()
        serve(self.exchange, self.server, self.journal, self._between_arrivals)
        if not self.journal.accuracy["crosslm"]:
            said = [
                f"client {event['client']}: {event.get('error') or event['reason']}"
                for event in self.run.events()
                if event["event"] == "failure" or (event["event"] == "gate" and not event["passed"])
            ]
            if not said:
                raise UnservedError(f"{self.run.path}: no client could be served, for none has come; give it clients")
            raise UnservedError(
                "\n".join([f"{self.run.path}: no client could be served; when this is mended, run again:", *said])
            )
        if config.federation.closing:
            close(self.exchange, self.server, self.journal, self._between_arrivals)
            self.journal.measure_the_rest()
        return self._finish()

    # -- the beginning, and going on ---------------------------------------------------------

    def _begin(self) -> None:
        config, run, journal = self.config, self.run, self.journal
        for warning in self.split.warnings:
            self.progress.note(f"warning: {warning}")
            run.event("warning", message=warning)
        for client_id, examples in self.split.private.items():
            spec = describe_spec(self.specs[client_id])
            self.progress.note(f"client {client_id}: {class_report(examples, config)}; {spec}")
        if self.loaded.judge:
            journal.judge = evaluate.train_judge(self.loaded.judge, config, self.split.judge, self.progress)
        self.judge_accuracy = journal.judge.accuracy(self.split.test) if journal.judge else None
        specs = {name: spec.model_dump() for name, spec in self.specs.items()}
        run.event("start", versions=versions(), specs=specs)
        count = evaluate.base_texts(config)
        journal.base_pool = self.meter.texts(self.llm, "original LLM", count, "base")
        journal.count(journal.base_pool)
        if config.asks_llm:
            journal.original_reads()
        self.before = self.meter.reading(self.llm, "before")
        put = self.checkpoints.put
        self._kept: dict[str, Any] = {
            "judge": put(snapshot.slm_bytes(journal.judge.to_state())) if journal.judge else None,
            "judge_accuracy": self.judge_accuracy,
            "base_pool": put(snapshot.texts_bytes(journal.base_pool)),
            "base_said": put(json.dumps(journal.base_said).encode()),
            "before": self.before,
            "inputs": self.inputs,
            "begin_with": self.begin_with,
        }
        self.server.begin(journal.base_pool, self.public)
        self.exchange.go_on(0, run.barred())
        self._saved = -1
        self._save({"outcome": "beginning"})

    def _restore(self, record: dict[str, Any]) -> None:
        state, get = record["state"], self.checkpoints.get
        self._kept = state["kept"]
        if self._kept["inputs"] != self.inputs:
            raise RunError(
                f"{self.run.path}: the data files have changed since this run began; put them back as they were"
            )
        if self._kept["judge"]:
            self.journal.judge = SLM.from_state(
                snapshot.slm_state(get(self._kept["judge"])), self.task.labels, self.config.device
            )
        self.judge_accuracy, self.before = self._kept["judge_accuracy"], self._kept["before"]
        self.journal.base_pool = snapshot.texts_of(get(self._kept["base_pool"]))
        self.journal.base_said = json.loads(get(self._kept["base_said"]))
        self.journal.restore(state["journal"])
        self.server.begin(self.journal.base_pool, self.public)
        snapshot.go_back_to(self.server, record, get)
        self._clients = state["clients"]
        then = self._kept.get("begin_with", self.begin_with)  # checkpoints of earlier versions do not have it
        snapshot.check_models(then, self.begin_with, {*self._clients, *self.run.barred()})
        for client_id, kept in self._clients.items():
            told = None if kept["counts"] is None else tuple(kept["counts"])
            state_then, metrics = snapshot.slm_state(get(kept["slm"])), kept.get("metrics", [])
            self.exchange.clients[client_id].restore(state_then, kept["rounds"], told, metrics)
        self.exchange.bytes_up |= state["bytes_up"]
        self.exchange.bytes_down |= state["bytes_down"]
        self.exchange.go_on(record["arrival"], self.run.barred())
        self._saved = record["arrival"]
        self._started -= state["seconds"].pop("total")
        self.progress.seconds.update(state["seconds"])
        if why := self.checkpoints.prune():  # who was killed may not have come to it
            self.run.event("warning", message=why)
            self.progress.note(f"warning: {why}")
        self.progress.note(f"{self.run.path}: going on after arrival {record['arrival']}")

    # -- between arrivals --------------------------------------------------------------------

    def _between_arrivals(self) -> bool:
        """The safe point: save what the last arrival did, stop if asked to, end if nobody is left."""
        if self.exchange.arrivals > self._saved:
            self._save(self.journal.cause)
        if self.stop_requested():
            raise StoppedError(
                f"stopped after arrival {self._saved}; everything so far is in {self.run.path}. "
                f"To go on: {self.run.resuming()}"
            )
        return self.exchange.exhausted()

    def _save(self, cause: dict[str, Any]) -> None:
        put, who = self.checkpoints.put, cause.get("client")
        if who:
            client = self.exchange.clients[who]
            slm = put(snapshot.slm_bytes(client.slm.to_state()))
            told = {"counts": client.told_counts, "metrics": list(client.told_metrics)}
            self._clients[who] = {"rounds": client.rounds, "slm": slm, **told}
        state = {
            "kept": self._kept,
            "journal": self.journal.state(),
            **snapshot.server_state(self.server, put),
            "clients": self._clients,
            "bytes_up": self.exchange.bytes_up,
            "bytes_down": self.exchange.bytes_down,
            "seconds": {**self.progress.seconds, "total": time.perf_counter() - self._started},
            "events": self.run.keep_events(),
        }
        self.checkpoints.write(self.exchange.arrivals, cause, put(snapshot.adapter_bytes(self.server)), state)
        self._saved = self.exchange.arrivals
        self.journal.cause = {}  # of the next arrival nothing is known yet

    # -- the end -----------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        config, run, journal = self.config, self.run, self.journal
        with self.llm.interpolated(config.llm.interpolation):
            run.save_llm(self.llm)
            readings = {"before": self.before, "after": self.meter.reading(self.llm, "after")}
            final = self.meter.texts(self.llm, "enhanced LLM", config.evaluation.nlg_samples, "final")
        journal.count(final)
        slms, steps = journal.standalone.items(), self.server.steps
        summary = self._summary(self.meter.compare(readings, journal.base_pool, final, slms, steps, journal.judge))
        if isinstance(self.llm, CachedLLM):  # the seconds above say nothing then
            summary["llm_cache"] = {"found": self.llm.cache.found, "made": self.llm.cache.made}
        if config.privacy.epsilon is not None and (earlier := run.rolled_back_from()):
            summary["rolled_back_from"] = earlier  # whose epsilons are no part of this run's
        write_cards(run, config, summary)
        run.summarise(summary)
        return summary

    def _summary(self, llm: dict[str, dict[str, float]]) -> dict[str, Any]:
        config, journal, exchange = self.config, self.journal, self.exchange
        rows = {name: examples.class_counts(len(self.task.labels)) for name, examples in self.split.private.items()}
        if (how := config.privacy.told_counts) != "exact":
            rows = {name: [0] * len(self.task.labels) for name in rows}
        if how == "noisy":
            rows |= told_counts(self.run.events())
        return {
            "task": config.name,
            "preset": config.preset,
            "seed": config.seed,
            "inputs": self.inputs,
            "versions": versions(),
            "device": config.device,
            "llm_dtype": str(self.llm.model.dtype).removeprefix("torch."),
            "slm_dtype": {
                "private": str(fit_dtype(config.slm.private, config.device)).removeprefix("torch."),
                "synthetic": str(fit_dtype(config.slm.synthetic, config.device)).removeprefix("torch."),
            },
            "seconds": {name: round(value, 2) for name, value in self.progress.seconds.items()}
            | {"total": round(time.perf_counter() - self._started, 2)},
            "slm": {method: evaluate.with_mean(values) for method, values in journal.accuracy.items()},
            "confusion": journal.confusion,
            "llm": {name: {when: found.get(name) for when, found in llm.items()} for name in LLM_MEASURES},
            "tokens_generated": journal.tokens_generated,
            "texts_removed": journal.removed,
            "judge_accuracy": self.judge_accuracy,
            "nlu_rows": len(evaluate.nlu_rows(config, self.split.test)),
            "reward_hacking": arrivals.reward_hacking(self.run.events(), self.progress.note),
            "test_rows": {name: len(test) for name, test in self.split.tests.items()},
            "no_say": arrivals.without_a_say(self.run.events()),
            "clients": {
                name: {
                    "model": self.specs[name].model_dump(),
                    "rows": dict(zip(self.task.labels, rows[name], strict=True)),  # as they may be told
                    "bytes_up": exchange.bytes_up[name],
                    "bytes_down": exchange.bytes_down[name],
                    "decision": journal.decisions.get(name),
                }
                for name in self.split.private
            },
            "privacy": privacy_summary({name: client.told_metrics for name, client in exchange.clients.items()}),
            "peak_memory_bytes": peak_memory_bytes(),
        }
