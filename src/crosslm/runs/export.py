"""A finished run as folders that other people's tools open, and on a hub if that is asked for."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crosslm.errors import ConfigError, DataError, RunError
from crosslm.runs import cards
from crosslm.runs.finished import Run
from crosslm.runs.folders import check_elsewhere
from crosslm.support.files import expanded
from crosslm.support.writing import made_anew

PARTS = ("slm", "llm", "synthetic")
NUMBERS = ("reward", "diversity", "score")


@dataclass(frozen=True)
class Exported:
    """One folder of an export."""

    folder: Path
    name: str
    """What it is called after the repository's name on a hub: ``slm-north``, ``llm``, ``synthetic``."""
    kind: Literal["model", "dataset"] = "model"


def export_run(run: Run, dest: str | Path, parts: Iterable[str] = PARTS, merged_llm: bool = False) -> list[Exported]:
    """Copy what a run made into a new folder, which its owner alone may read, each thing with a card.

    ``slm/CLIENT``: a classifier. ``llm``: the adapter (or the whole model after full fine-tuning).
    ``llm-merged``: the adapter added into the weights. ``synthetic``: Parquet files that
    ``datasets.load_dataset`` opens.

    Args:
        run: a complete run.
        dest: folder to create.
        parts: which of ``slm``, ``llm`` and ``synthetic``.
        merged_llm: whether to write ``llm-merged`` too; loads the LLM.

    Raises:
        RunError: the folder holds something already, or a part of the run is gone.
        CrosslmError: the LLM cannot be loaded, or the datasets library is not installed.

    Example:
        >>> import crosslm
        >>> [folder.name for folder in crosslm.export_run(crosslm.Run.open("runs/tickets-1"), "shared")]
        ['slm-north', 'slm-south', 'llm', 'synthetic']
    """
    target, wanted = expanded(dest), set(parts)
    if unknown := wanted - set(PARTS):
        raise ConfigError(f"there is no part {sorted(unknown)[0]!r} to export; the parts are: {', '.join(PARTS)}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RunError(f"{target}: holds something already and nothing is written over; name a new folder")
    check_elsewhere(target)
    if "synthetic" in wanted:
        check_datasets()  # before the LLM is loaded and merged
    exported: list[Exported] = []
    with made_anew(target, "or name another DEST") as work:
        if "slm" in wanted:
            for client in run.clients:
                folder = _copied(run.slm_folder(client), work / "slm" / client)
                if run.kept_its_own(client):
                    card = cards.slm_card(client, 0, run.config, run.summary, own=True)
                    (folder / "README.md").write_text(card, encoding="utf-8")
                exported.append(Exported(folder, f"slm-{client}"))
        if "llm" in wanted:
            exported.append(Exported(_llm(run, work / "llm"), "llm"))
        if merged_llm:
            exported.append(Exported(_merged(run, work / "llm-merged"), "llm-merged"))
        if "synthetic" in wanted:
            exported.append(Exported(_dataset(run, work / "synthetic"), "synthetic", "dataset"))
    return [Exported(target / one.folder.relative_to(work), one.name, one.kind) for one in exported]


def push(
    exported: Iterable[Exported], repository: str, public: bool = False, on_news: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Upload each folder of an export to a repository of its own on the Hugging Face hub.

    Args:
        exported: what :func:`export_run` returned.
        repository: ``OWNER/NAME``; the folders become ``OWNER/NAME-slm-CLIENT``, ``OWNER/NAME-llm`` and so on.
        public: whether everybody may see them. Otherwise new repositories are private, and one that is there already
            must be.
        on_news: told before each upload.

    Returns:
        The repositories.

    Raises:
        ConfigError: the name is not ``OWNER/NAME``.
        RunError: the hub cannot be reached, or refuses; or a repository is not private, and then nothing is uploaded.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    api, named = HfApi(), {f"{repository}-{one.name}": one for one in exported}
    done: list[str] = []
    seen_by: dict[str, str] = {}
    for name, one in named.items():
        with _asking_the_hub(name, done):
            api.create_repo(name, repo_type=one.kind, private=not public, exist_ok=True)
            # what was there already keeps the visibility that it has
            is_private = api.repo_info(name, repo_type=one.kind).private is True
        if not (is_private or public):
            raise RunError(
                f"{name}: is there already and not private; nothing was uploaded. Make it private on the hub, choose "
                "another name for --push, or add --public if everybody may see it"
            )
        seen_by[name] = "private" if is_private else "public"
    for name, one in named.items():
        on_news(f"Uploading {one.folder} to {name} ({seen_by[name]})")
        with _asking_the_hub(name, done):
            api.upload_folder(repo_id=name, folder_path=one.folder, repo_type=one.kind)
        done.append(name)
    return done


@contextmanager
def _asking_the_hub(name: str, done: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # also what the hub's library lets through of its HTTP library
        raise RunError(
            f"{name}: the hub cannot be reached or refuses: {error}\n"
            "Run hf auth login with a token that may write, and export to a new folder with --push again. "
            f"Uploaded so far: {', '.join(done) or 'nothing'}"
        ) from error


def check_repository(name: str) -> None:
    """Find out that a repository's name can be one, before anything is written.

    Raises:
        ConfigError: it is not ``OWNER/NAME``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ConfigError(
            f"--push {name!r}: must look like OWNER/NAME in letters, digits, - _ and ., for example acme/tickets"
        )


def _copied(source: Path, target: Path) -> Path:
    """A copy of a folder; the card in it was written at the end of the run."""
    if not source.is_dir():
        raise RunError(f"{source}: is gone; the run folder is damaged, so run its config.toml again")
    shutil.copytree(source, target)
    return target


def _llm(run: Run, folder: Path) -> Path:
    """The adapter, made fit for another machine; after full fine-tuning the whole model as it is."""
    _copied(run.llm_folder, folder)
    settings = folder / "adapter_config.json"
    if settings.is_file():
        adapter = json.loads(settings.read_text(encoding="utf-8"))
        adapter["base_model_name_or_path"] = cards.shown(run.config.llm.model)
        settings.write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
        if run.config.llm.vocabulary_texts:  # a trimmed tokenizer without its model would mislead
            for path in folder.iterdir():
                if not path.name.startswith("adapter_") and path.name != "README.md":
                    path.unlink()
    return folder


def _merged(run: Run, folder: Path) -> Path:
    """The whole enhanced model, for those who do not use PEFT."""
    llm = run.llm()
    model: Any = llm.model if llm.config.adapter == "full" else llm.model.merge_and_unload()
    model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(cards.llm_card(run.config, run.summary, merged=True), encoding="utf-8")
    return folder


def check_datasets() -> None:
    """Find out that the library that writes Parquet is installed.

    Raises:
        DataError: it is not.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DataError(
            "writing Parquet needs the datasets library; run: pip install 'crosslm[datasets]', "
            "or leave the synthetic text out with --part slm --part llm"
        ) from error


def _dataset(run: Run, folder: Path) -> Path:
    """Parquet files and the card that tells ``load_dataset`` of them."""
    from datasets import ClassLabel, Dataset, Features, Value

    text, number, whole = Value("string"), Value("float32"), Value("int64")
    columns = {"text": text, "label": ClassLabel(names=list(run.task.labels)), "prompt": text, "source": text}
    columns |= {"step": whole, "client": text, **dict.fromkeys(NUMBERS, number), "rank": whole, "kept": Value("bool")}
    features = Features(columns | {"seed": whole})
    everything = [{name: row.get(name) for name in features} for row in run.synthetic()]
    if not everything:
        raise RunError(
            f"{run.path / 'synthetic'}: has no texts; the run folder is damaged, so run its config.toml again"
        )
    parts = {"selected": [row for row in everything if row["kept"]], "all": everything}
    parts = {name: rows for name, rows in parts.items() if rows}
    (folder / "data").mkdir(parents=True)
    with _quiet():
        for name, rows in parts.items():
            Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{name}.parquet")
    card = cards.dataset_card(run.config, {name: len(rows) for name, rows in parts.items()}, run.summary)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of the datasets library for a while."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
