"""What a server between machines begins with: its run folder, as it was left, and its models."""

from collections.abc import Callable
from pathlib import Path

from crosslm.config import Config, FederationConfig
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.sources import model_folder, resolve_device
from crosslm.runs.checkpoint import Checkpoints
from crosslm.runs.preparation import check_same, original_llm
from crosslm.runs.rundir import CONFIG, RunDir
from crosslm.server import Server
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for
from crosslm.task import Task

CHANGEABLE = (
    *(f"federation.{name}" for name in FederationConfig.model_fields if name != "closing_texts"),
    *("intake", "checkpoint", "tracking", "clients", "data", "device"),
    *("llm.model", "selection.encoder", "gate.public_texts", "evaluation.perplexity_text", "llm.vocabulary_texts"),
)
"""What of a server's configuration may be changed between two starts: who comes, how long is waited, and where files
and models are, but not how many texts the LLM has written. That it is the same one is known by its weights."""


def open_folder(folder: Path, config: Config) -> RunDir:
    """The run folder of a server, which is made where there is none; a beginning that was cut off is taken away.

    Raises:
        RunError: the run in it has another configuration, in more than :data:`CHANGEABLE`; names what differs.
    """
    if not (folder / CONFIG).exists():
        return RunDir.create(folder, config)
    run = RunDir.open(folder)
    if Checkpoints(run).last() is None:  # nothing has been made of it yet
        run.go_back(0)
    else:
        hint = f"put that back in {folder.parent / CONFIG} as it is in {folder / CONFIG}, or provision anew"
        check_same(config, folder, CHANGEABLE, hint)
    run.write(CONFIG, config.dump())
    return run


def load_server(config: Config, cache: Path, note: Callable[[str], None]) -> Server:
    """The method's server with its models, on the device that there is; its ``config`` names that one.

    Raises:
        CrosslmError: a device, a model or the labels' words cannot be used.
    """
    config = config.model_copy(update={"device": resolve_device(config.device)})
    folder_of_llm = original_llm(config, cache, note)  # before anybody is asked for anything
    llm = LLM.load(folder_of_llm, config.llm, seed_for(config.seed, "llm"), config.device)
    encoder = SentenceEncoder(model_folder(config.selection.encoder, cache, note), config.device)
    return Server(config, Task.from_config(config.task), llm, encoder, Progress())


def notes_of(run: RunDir) -> Callable[[str], None]:
    """Keeps news as events of a run, since nobody looks at a server's screen."""
    return lambda message: run.event("note", message=message)
