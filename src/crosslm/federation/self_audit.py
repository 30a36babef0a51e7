"""What a silo can find out by itself before anything leaves: what it reaches alone, and what an upload would tell."""

from pathlib import Path
from typing import Any

from crosslm.data.examples import Examples
from crosslm.errors import DataError
from crosslm.federation.silo_models import SiloModels
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.sources import check_model, model_folder, resolve_device
from crosslm.runs.audit import attack_rows, figures_of, losses, trained_places
from crosslm.runs.baseline import without_others
from crosslm.support.progress import Display, Progress
from crosslm.support.seeding import seed_for


def audit_silo(silo: SiloModels) -> dict[str, Any]:
    """Train the classifier that the silo would upload next, and ask of its loss who was in the training.

    Nothing is kept or sent, and no privacy budget is spent: what is trained goes with this process. Members are the
    rows that it learns, others the rows of ``data.test``, with the same share of each label.

    Args:
        silo: its kit, private rows and test rows.

    Returns:
        As ``clients.CLIENT`` and ``privacy`` of :func:`crosslm.runs.audit.audit_run`, of this silo alone.

    Raises:
        DataError: it has no test rows, or too few rows of either.
    """
    settings, private, test = silo.settings, silo.private(), silo.test()
    who = f"silo {settings.id}"
    if test is None:
        raise DataError(f"{who}: an audit needs rows that nothing was trained on: name a file in silo.toml, data.test")
    known = set(private.texts)
    fresh = [place for place, text in enumerate(test.texts) if text not in known]
    fit, holds_out = settings.fit, settings.fit.patience or settings.acceptance.enabled
    trained = private
    if holds_out and settings.privacy.epsilon is None:
        trained = private.take(trained_places(private, fit, settings.seed, settings.id))
    seed = seed_for(settings.seed, "audit", settings.id)
    try:
        rows = attack_rows(trained, test.take(fresh), seed)
    except DataError as error:
        raise DataError(f"{who}: {error}; here test rows are those of data.test, in silo.toml: name a file") from error
    others = Examples(rows.others.texts + rows.reference.texts, rows.others.labels + rows.reference.labels)
    client = silo.client()
    metrics = client.train().metrics
    members, strangers = (-losses(client.slm, part.texts, part.labels) for part in (rows.members, others))
    membership = {
        "members": len(rows.members),
        "others": len(others),
        "train_accuracy": client.slm.accuracy(rows.members),
        "attacks": {"loss": figures_of(members, strangers, seed)},
    }
    bound = {settings.id: {"epsilon": metrics["dp/epsilon"]}} if "dp/epsilon" in metrics else {}
    return {"clients": {settings.id: {"membership": membership}}, "privacy": bound}


def baseline_of_silo(kit: Path, cache: Path, display: Display | None = None) -> dict[str, dict[str, Any]]:
    """What the silo reaches without the federation: as :func:`crosslm.runs.baseline.baselines`, of this silo alone.

    Nothing is kept or sent, and no privacy budget is spent.

    Args:
        kit: the silo's.
        cache: where converted models are kept.
        display: shows progress.

    Raises:
        CrosslmError: it has no test rows, or the rows, the classifier or the encoder cannot be used.
    """
    silo, progress = SiloModels(kit, cache), Progress(display)
    settings, private, test = silo.settings, silo.private(), silo.test()
    who = f"silo {settings.id}"
    if test is None:
        raise DataError(f"{who}: has no rows to measure on: name a file as data.test in silo.toml")
    check_model(settings.encoder, f"{who}: encoder")
    encoder = SentenceEncoder(model_folder(settings.encoder, cache, progress.note), resolve_device(settings.device))
    client = silo.client(silo.pretrained(), 0)
    client.train()
    found = without_others(private, test, client.slm, encoder, progress, who)
    return {settings.id: found, "mean": found}
