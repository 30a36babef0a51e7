"""CrossLM: a server's large language model and many clients' classifiers make each other better.

The public names are those of ``__all__``. What needs torch is imported when it is first used, so
that reading a configuration takes no time.

Reading a configuration, a packaged one or one's own:
    >>> import crosslm
    >>> sorted(crosslm.packaged())[:2]
    ['ag_news', 'demo']
    >>> config = crosslm.load("sst2", overrides=("seed=7",))
    >>> isinstance(config, crosslm.Config), config.task.labels
    (True, ('negative', 'positive'))
    >>> crosslm.Task.from_config(config.task).query("A film to remember.")
    'A film to remember. This is a'
    >>> try:
    ...     crosslm.load("sst2", overrides=("llm.sampels=7",))
    ... except crosslm.CrosslmError as error:
    ...     str(error).split(": ")[1]
    "unknown key llm.sampels; did you mean 'samples'?"

Making a run, and using what came of it; ``crosslm.Run.open`` opens one that is finished:
    >>> run = crosslm.run(crosslm.load("tickets.toml"), "runs/tickets-3")
    >>> [prediction] = run.predict("north", ["Nobody can log in and patients are waiting."])
    >>> isinstance(prediction, crosslm.Prediction)
    True
    >>> isinstance(run.slm("north"), crosslm.SLM), isinstance(run.llm(), crosslm.LLM)
    (True, True)

One arrival by hand, for a loop of one's own:
    >>> from crosslm.data.split import load_split
    >>> from crosslm.models.encoder import SentenceEncoder
    >>> rows = load_split(run.config).private["north"]
    >>> client = crosslm.Client("north", rows, run.slm("north"), run.config.slm.private, seed=0)
    >>> encoder = SentenceEncoder(run.config.selection.encoder)
    >>> llm = crosslm.LLM.load(run.original_llm(), run.config.llm, seed=0)
    >>> server = crosslm.Server(run.config, run.task, llm, encoder)  # server.begin opens a gate
    >>> download, record = server.step(client.train())
    >>> client.install(download).accepted
    True
    >>> len(record.receipts) == run.config.selection.pool
    True
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from crosslm.config import Config
from crosslm.config_file import load, packaged
from crosslm.errors import CrosslmError
from crosslm.task import Task

if TYPE_CHECKING:
    from crosslm.client import Client
    from crosslm.models.llm import LLM
    from crosslm.models.slm import SLM
    from crosslm.runs.export import export_run
    from crosslm.runs.finished import Prediction, Run, run
    from crosslm.server import Server

__all__ = [
    "LLM",
    "SLM",
    "Client",
    "Config",
    "CrosslmError",
    "Prediction",
    "Run",
    "Server",
    "Task",
    "__version__",
    "export_run",
    "load",
    "packaged",
    "run",
]

_LAZY = {
    "Client": "client",
    "LLM": "models.llm",
    "Prediction": "runs.finished",
    "Run": "runs.finished",
    "SLM": "models.slm",
    "Server": "server",
    "export_run": "runs.export",
    "run": "runs.finished",
}


def __getattr__(name: str) -> Any:
    """Import a public name that needs torch, at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, those not imported yet included."""
    return sorted(__all__)
