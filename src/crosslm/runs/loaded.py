"""The models of a run in one process, all loaded before its folder is begun: one that cannot be used leaves nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crosslm import evaluate
from crosslm.client import Client
from crosslm.config import Config, SLMSpec
from crosslm.data.examples import Examples
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import model_folder
from crosslm.privacy.canaries import plant
from crosslm.privacy.leaks import LeakCheck
from crosslm.privacy.private_fit import PrivateTraining
from crosslm.runs.llm_cache import CachedLLM, LLMCache
from crosslm.runs.preparation import Prepared
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for


@dataclass(frozen=True)
class Loaded:
    """Every model of a run, before anything is trained."""

    llm: LLM
    encoder: SentenceEncoder
    judge: SLM | None
    """To be trained on held-out rows; None where there are none."""
    clients: list[Client]


def load_models(
    config: Config,
    prepared: Prepared,
    cache: Path,
    progress: Progress,
    make_client: Callable[..., Client],
    llm_cache: LLMCache | None = None,
) -> Loaded:
    """Load everything that a run trains or measures with.

    Args:
        config: of the run, with the device that is used.
        prepared: its data, and who has which model.
        cache: where converted models are kept.
        progress: of the run.
        make_client: as in :func:`crosslm.experiment.run_local`.
        llm_cache: of what the LLM does, for an LLM that does none of it twice.

    Raises:
        ModelError: a model cannot be loaded.
    """
    specs = prepared.specs
    names = {config.slm.models[0].model, config.selection.encoder, *(spec.model for spec in specs.values())}
    folders = {name: model_folder(name, cache, progress.note) for name in sorted(names)}
    llm = _load_llm(config, prepared.llm_folder, llm_cache)
    encoder = SentenceEncoder(folders[config.selection.encoder], config.device)
    judge = evaluate.load_judge(folders[config.slm.models[0].model], config) if len(prepared.split.judge) else None
    rows = prepared.split.private
    clients = [
        load_client(name, spec, folders[spec.model], rows[name], config, encoder, progress, make_client)
        for name, spec in specs.items()
    ]
    return Loaded(llm, encoder, judge, clients)


def _load_llm(config: Config, folder: str, cache: LLMCache | None) -> LLM:
    seed = seed_for(config.seed, "llm")
    if cache is None:
        return LLM.load(folder, config.llm, seed, config.device)
    llm = CachedLLM.load(folder, config.llm, seed, config.device)
    llm.cache = cache
    return llm


def load_client(
    name: str,
    spec: SLMSpec,
    folder: str,
    rows: Examples,
    config: Config,
    encoder: SentenceEncoder | None,
    progress: Progress,
    make_client: Callable[..., Client] = Client,
) -> Client:
    """A client before step 1, with the classifier and the rows that it has in a run.

    Args:
        name: the client's.
        spec: its architecture.
        folder: where the architecture's weights are.
        rows: its private ones.
        config: of the run, with the device that is used.
        encoder: for the leak check, which looks at what comes back; None leaves it out.
        progress: shows the training.
        make_client: as in :func:`crosslm.experiment.run_local`.

    Raises:
        ModelError: the SLM cannot be loaded.
    """
    slm = SLM.of_spec(folder, spec, config, seed_for(config.seed, "head", name))
    privacy = config.privacy
    private = plant(rows, slm.tokenizer, len(config.task.labels), privacy.canaries, config.seed, name)
    training = PrivateTraining(privacy, config.federation.participations) if privacy.epsilon else None
    leaks = LeakCheck(private.texts, privacy, encoder) if encoder is not None and privacy.checks_leaks else None
    return make_client(
        name,
        private,
        slm,
        config.slm.private,
        config.seed,
        progress=progress,
        acceptance=config.acceptance,
        privacy=training,
        leaks=leaks,
        canaries=privacy.canaries,
        hides_counts=privacy.told_counts == "hidden",
    )
