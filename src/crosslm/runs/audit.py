"""What a finished run gives away of its private rows: measured on the classifiers that were uploaded.

An attacker who has an uploaded SLM and a labelled row asks whether the row was in its training. The rows that were are
the client's own; the others are held-out rows of the run, as many of each label as far as there are so many.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslm.algorithm.membership import (
    auc,
    bootstrap_interval,
    confidence_logit,
    exposure,
    lira_scores,
    tpr_at_fpr,
)
from crosslm.algorithm.overlap import longest_shared, nearest_similarity
from crosslm.client import split_rows
from crosslm.config import Config, FitConfig
from crosslm.config_file import load
from crosslm.data.examples import Examples
from crosslm.data.split import Split, load_split
from crosslm.errors import DataError, ModelError, RunError
from crosslm.models.encoder import Encoder, SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import model_folder, resolve_device
from crosslm.privacy.canaries import Canaries, draw_canaries
from crosslm.privacy.private_layers import as_under_dp
from crosslm.runs.finished import has_other_data
from crosslm.runs.preparation import client_specs, original_llm
from crosslm.runs.rundir import CONFIG, RunDir
from crosslm.support.progress import Display, Progress
from crosslm.support.seeding import seed_for
from crosslm.task import Task

FEWEST = 20  # rows on either side; with fewer an interval says nothing
SLM_CANDIDATES, LLM_CANDIDATES = 1023, 255  # that a canary is ranked among: 10 and 8 bits at most
LLM_BATCH = 16


@dataclass(frozen=True)
class Rows:
    """The rows of one attack."""

    members: Examples
    """That the SLM was trained on."""
    others: Examples
    """That it was not, nor the reference model."""
    reference: Examples
    """That the attacker trains the reference model on."""


def audit_run(run: RunDir, cache: Path, shadows: int = 0, display: Display | None = None) -> dict[str, Any]:
    """Attack every uploaded SLM of a run, look for its canaries, and compare its synthetic text with private text.

    Args:
        run: a complete run.
        cache: where converted models are kept.
        shadows: shadow models of the LiRA attack for each client, an even number; 0: no such attack.
        display: shows progress.

    Returns:
        What ``audit.json`` in the run folder holds: for each client ``membership``, ``overlap`` and, where canaries
        were planted, ``canaries``.

    Raises:
        CrosslmError: the run is not complete or has no uploads, its data or models are gone, or its data has changed.
    """
    if shadows % 2 or shadows < 0:
        raise RunError(f"--shadows must be 0 or more, and even, found {shadows}: each row is in one half of them")
    return _Audit(run, cache, shadows, display).execute()


class _Audit:
    """What the parts of an audit share."""

    def __init__(self, run: RunDir, cache: Path, shadows: int, display: Display | None) -> None:
        self.summary = run.summary()
        run.check_in_one_process("audited")
        config = load(run.path / CONFIG)
        self.config: Config = config.model_copy(update={"device": resolve_device(config.device)})
        self.run, self.cache, self.shadows = run, cache, shadows
        self.progress, self.task = Progress(display), Task.from_config(config.task)
        self.split: Split = load_split(self.config)
        if has_other_data(self.config, self.split, self.summary):
            raise RunError(
                f"{run.path}: the data files have changed since this run was made, so that they do not tell which rows "
                "a classifier was trained on; put them back as they were, or run it again"
            )
        self.specs = client_specs(self.config, list(self.split.private))

    def execute(self) -> dict[str, Any]:
        clients = [name for name in self.summary["slm"]["crosslm"] if name != "mean"]
        slms = {client: self._uploaded(client) for client in clients}
        encoder = SentenceEncoder(self._folder(self.config.selection.encoder), self.config.device)
        figures: dict[str, Any] = {"clients": {}, "privacy": self.summary.get("privacy", {})}
        for client, slm in slms.items():
            rows = attack_rows(
                self._trained_on(client),
                self._held_out(client),
                seed_for(self.config.seed, "audit", client),
            )
            figures["clients"][client] = {
                "membership": self._membership(client, slm, rows),
                "overlap": self._overlap(client, rows, encoder),
            }
        if self.config.privacy.canaries:
            self._canaries(slms, figures["clients"])
        self.run.write("audit.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        return figures

    # -- parts -------------------------------------------------------------------------------

    def _folder(self, name: str) -> str:
        return model_folder(name, self.cache, self.progress.note)

    def _uploaded(self, client: str) -> SLM:
        folder = self.run.path / "uploads" / client
        if not folder.is_dir():
            raise RunError(f"{folder}: the run did not keep what the client uploaded; run it again to audit it")
        try:
            slm = SLM.load_trained(str(folder), self.config.device)
            slm.order_labels(self.task.labels)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: the classifier cannot be loaded: {error}; run the run again") from error
        return slm

    def _trained_on(self, client: str) -> Examples:
        """The private rows, canaries aside, that the last upload's weights were fitted to.

        Those that the client held out are left out; under DP it holds out none.
        """
        config, private = self.config, self.split.private[client]
        if config.privacy.epsilon is not None or not (config.slm.private.patience or config.acceptance.enabled):
            return private
        return private.take(trained_places(private, config.slm.private, config.seed, client, config.privacy.canaries))

    def _held_out(self, client: str) -> Examples:
        """Rows that no SLM was trained on: the client's test rows and the judge's, without copies of private ones."""
        seen = {text for private in self.split.private.values() for text in private.texts}
        rows: dict[str, int] = {}
        for examples in (self.split.tests[client], self.split.judge):
            for text, label in zip(examples.texts, examples.labels, strict=True):
                if text not in seen:
                    rows.setdefault(text, label)
        return Examples(list(rows), list(rows.values()))

    def _fit(self, client: str, rows: Examples, purpose: str, patience: int | None = None) -> SLM:
        """A classifier of the client's architecture, trained as it trains but without noise: the attacker's own."""
        config, spec = self.config, self.specs[client]
        seed = seed_for(config.seed, "audit", client, purpose)
        slm = SLM.of_spec(self._folder(spec.model), spec, config, seed)
        fit, private = config.slm.private, config.privacy.epsilon is not None
        if private:
            patience = 0  # DP-SGD heeds none
        fit = fit if patience is None else fit.model_copy(update={"patience": patience})
        with (
            self.progress.stage(f"train {purpose}", client, len(rows) * fit.epochs, "rows") as advance,
            as_under_dp(slm, rows, config.privacy) if private else nullcontext(),
        ):
            slm.fit(rows, fit, seed, advance)
        return slm

    def _membership(self, client: str, slm: SLM, rows: Rows) -> dict[str, Any]:
        seed = seed_for(self.config.seed, "audit", client, "bootstrap")
        reference = self._fit(client, rows.reference, "reference model")
        both = rows.members.texts + rows.others.texts
        labels = rows.members.labels + rows.others.labels
        loss = losses(slm, both, labels)
        attacks = {"loss": -loss, "calibrated loss": losses(reference, both, labels) - loss}
        if self.shadows:
            attacks[f"LiRA, {self.shadows} shadow models"] = self._lira(client, Examples(both, labels), loss)
        count = len(rows.members)
        return {
            "members": count,
            "others": len(rows.others),
            "train_accuracy": slm.accuracy(rows.members),
            "attacks": {name: figures_of(scores[:count], scores[count:], seed) for name, scores in attacks.items()},
        }

    def _lira(self, client: str, rows: Examples, loss: Tensor) -> Tensor:
        """Shadow models in pairs; of each pair one is trained on a random half of the rows, one on the other."""
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "audit", client, "shadows"))
        inside = torch.zeros(self.shadows, len(rows), dtype=torch.bool)
        for pair in range(0, self.shadows, 2):
            inside[pair, torch.randperm(len(rows), generator=generator)[: len(rows) // 2]] = True
            inside[pair + 1] = ~inside[pair]
        confidences = []
        for number, chosen in enumerate(inside):
            half = rows.take(chosen.nonzero().flatten().tolist())
            shadow = self._fit(client, half, f"shadow model {number}", patience=0)  # or not all of the half is inside
            confidences.append(confidence_logit((-losses(shadow, rows.texts, rows.labels)).exp()))
        return lira_scores(confidence_logit((-loss).exp()), torch.stack(confidences), inside)

    def _overlap(self, client: str, rows: Rows, encoder: Encoder) -> dict[str, Any]:
        """The texts that trained SLMs beside all of this client's private rows.

        To tell what of that is the language of the field, also beside a sample of them and as many rows that nobody
        had: the more rows, the nearer is the nearest.
        """
        texts = [text for _, text, kept in self._synthetic() if kept]
        if not texts:
            return {"texts": 0}
        vectors, private = encoder.encode(texts), self.split.private[client].texts
        count = min(len(private), len(rows.others))
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "audit", client, "overlap"))
        sample = [private[place] for place in torch.randperm(len(private), generator=generator)[:count].tolist()]
        beside = {"private": private, "private sample": sample, "held out": rows.others.texts[:count]}
        return {"texts": len(texts)} | {name: nearness(texts, vectors, real, encoder) for name, real in beside.items()}

    def _synthetic(self) -> list[tuple[str, str, bool]]:
        """Every text that the LLM wrote in the run: file, text, and whether it trained an SLM."""
        found = []
        for path in sorted((self.run.path / "synthetic").glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line:
                    row = json.loads(line)
                    found.append((path.stem, row["text"], bool(row.get("kept", False))))
        return found

    def _canaries(self, slms: dict[str, SLM], figures: dict[str, Any]) -> None:
        """Exposure of each client's canaries in its SLM, in the LLM, and in all that the LLM wrote."""
        config = self.config
        llm = LLM.load_trained(
            original_llm(config, self.cache, self.progress.note), str(self.run.path / "llm"), config.llm, config.device
        )
        written = [text for _, text, _ in self._synthetic()]
        for client, slm in slms.items():
            seed = seed_for(config.seed, "canaries", client)
            drawn = draw_canaries(slm.tokenizer, len(slm.labels), config.privacy.canaries, SLM_CANDIDATES, seed)
            with self.progress.stage("rank canaries", client, 1, "client") as advance:
                in_llm = llm_exposures(llm, self.task, drawn)
                advance(1)
            figures[client]["canaries"] = {
                "planted": len(drawn.planted),
                "slm_exposure": slm_exposures(slm, drawn),
                "llm_exposure": in_llm,
                "most_shared_words_in_texts": max(longest_shared(written, drawn.planted.texts), default=0),
            }


def trained_places(private: Examples, fit: FitConfig, seed: int, client: str, canaries: int = 0) -> list[int]:
    """The places of the private rows that a client which holds some out trains on."""
    trained, _ = split_rows(len(private) + canaries, fit, seed, client, canaries)
    return [place for place in sorted(trained) if place < len(private)]


def attack_rows(members: Examples, pool: Examples, seed: int) -> Rows:
    """Split held-out rows into the attack's others and the reference model's rows, with the members' label shares.

    As many others as members, and as many reference rows, if there are so many; else half of what there is.

    Args:
        members: rows that were trained on.
        pool: rows that were not.
        seed: of the draw.

    Raises:
        DataError: there are too few of either.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(pool), generator=generator).tolist()
    others: list[int] = []
    reference: list[int] = []
    classes = sorted(set(members.labels))
    places = {label: [place for place in order if pool.labels[place] == label] for label in classes}
    share = min(1.0, *(len(places[label]) / (2 * members.labels.count(label)) for label in classes))
    for label in classes:
        wanted = int(share * members.labels.count(label))
        others += places[label][:wanted]
        reference += places[label][wanted : 2 * wanted]
    if min(len(members), len(others)) < FEWEST:
        raise DataError(
            f"an audit needs {FEWEST} private rows and {2 * FEWEST} held-out ones with the same labels; found "
            f"{len(members)} and {len(others) + len(reference)}: give more test rows or data.judge_rows"
        )
    return Rows(members, pool.take(others), pool.take(reference))


def nearness(texts: list[str], vectors: Tensor, real: list[str], encoder: Encoder) -> dict[str, float]:
    """How near synthetic texts, whose sentence vectors are given, are to real ones: the nearest, and in the mean."""
    shared = torch.tensor(longest_shared(texts, real), dtype=torch.float64)
    near = nearest_similarity(vectors, encoder.encode(real)).cpu().double()
    return {
        "rows": len(real),
        "longest_shared_words": int(shared.max()),
        "mean_shared_words": float(shared.mean()),
        "nearest_similarity": float(near.max()),
        "mean_similarity": float(near.mean()),
    }


def losses(slm: SLM, texts: list[str], labels: list[int]) -> Tensor:
    """Cross-entropy of each text with its label, ``(texts,)``."""
    probabilities = slm.predict_proba(texts)
    return -probabilities[torch.arange(len(labels)), torch.tensor(labels)].double().clamp_min(1e-12).log()


def figures_of(members: Tensor, others: Tensor, seed: int) -> dict[str, Any]:
    """AUC and true-positive rate at 1 % false positives, each with its 95 % interval."""
    return {
        "auc": auc(members, others),
        "auc_interval": bootstrap_interval(auc, members, others, seed),
        "tpr": tpr_at_fpr(members, others),
        "tpr_interval": bootstrap_interval(tpr_at_fpr, members, others, seed),
    }


def slm_exposures(slm: SLM, canaries: Canaries) -> list[float]:
    """Bits by which each planted sentence stands out, by the classifier's loss with its label."""
    own = losses(slm, canaries.planted.texts, canaries.planted.labels)
    probabilities = slm.predict_proba(canaries.others).double().clamp_min(1e-12)
    return [
        exposure(float(loss), -probabilities[:, label].log())
        for loss, label in zip(own, canaries.planted.labels, strict=True)
    ]


@torch.inference_mode()
def llm_exposures(llm: LLM, task: Task, canaries: Canaries) -> list[float]:
    """The same for the LLM, by what it has come to find likelier than the original did, after its label's prompt."""
    others = canaries.others[:LLM_CANDIDATES]
    gained: dict[int, Tensor] = {}
    exposures = []
    for text, label in zip(canaries.planted.texts, canaries.planted.labels, strict=True):
        if label not in gained:
            gained[label] = _gains(llm, [task.prompt(label, 0) + other for other in others])
        exposures.append(exposure(-float(_gains(llm, [task.prompt(label, 0) + text])[0]), -gained[label]))
    return exposures


def _gains(llm: LLM, texts: list[str]) -> Tensor:
    """``log P_theta(text) - log P_theta_old(text)`` of each, ``(texts,)``."""
    parts = []
    for start in range(0, len(texts), LLM_BATCH):
        scores = llm.score([llm.encode(text) for text in texts[start : start + LLM_BATCH]])
        parts.append(((scores.logps - scores.reference_logps) * scores.mask).sum(dim=1).cpu().double())
    return torch.cat(parts)
