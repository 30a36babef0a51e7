"""CrossLM: a server's large language model and many clients' classifiers make each other better.

The public names are those of ``__all__``. What needs torch is imported when it is first used, so
that reading a configuration takes no time.

Example:
    >>> import crosslm
    >>> config = crosslm.load("sst2", overrides=("seed=7",))
    >>> config.task.labels
    ('negative', 'positive')
    >>> crosslm.Task.from_config(config.task).query("A film to remember.")
    'A film to remember. This is a'
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
    from crosslm.export import export_run
    from crosslm.finished import Prediction, Run, run
    from crosslm.models.llm import LLM
    from crosslm.models.slm import SLM
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
    "Prediction": "finished",
    "Run": "finished",
    "SLM": "models.slm",
    "Server": "server",
    "export_run": "export",
    "run": "finished",
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
