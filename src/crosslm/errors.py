"""The errors a user can meet. Each message says what was found, where, and what is allowed."""


class CrosslmError(Exception):
    """Base of every error that is the input's fault, not the program's (exit code 2)."""


class ConfigError(CrosslmError):
    """A configuration key or value is unknown, missing or impossible."""


class DataError(CrosslmError):
    """A data file, column, label or row cannot be used."""


class ModelError(CrosslmError):
    """A model cannot be found, fails its checksum, or is of an unsupported kind."""


class KeptFileError(ModelError):
    """A model that a silo has kept on its disk cannot be read, or is not as it was written."""


class CollapseError(ModelError):
    """The LLM hardly writes any text that can be used, or its update is not finite."""


class UploadError(CrosslmError):
    """An uploaded or downloaded message does not hold what it must."""

    told: str | None = None
    """What its silo is told, where it is not to see the message."""


class QuarantineError(UploadError):
    """An SLM may not reward the LLM, by what it does on the probe set."""

    told = "the gate has quarantined it"  # not the figures, by which one that is hostile could aim better

    def __init__(self, message: str, figures: dict[str, float]) -> None:
        super().__init__(message)
        self.figures = figures


class BrokenLLMError(UploadError):
    """The LLM broke on an SLM's rewards, and has been taken back to what it was before them."""

    told = "the LLM could not learn from it"  # the figures are of the server's LLM


class StoppedError(CrosslmError):
    """The run was asked to stop and did, at a safe point (exit code 130)."""


class LeakError(CrosslmError):
    """Text that comes back to a silo is too near to its private text."""


class RunError(CrosslmError):
    """A run folder cannot be written or read."""


class UnservedError(RunError):
    """A run came to its end and no client could be served."""


class FederationError(CrosslmError):
    """A kit, a key, a request or the state of a federation is not as it must be."""


class DeclinedError(FederationError):
    """A silo is asked for more than it has agreed to, or by another federation: asking again would not help."""


class ShortageError(CrosslmError):
    """This machine lacked memory or the like for a check: of what was to be checked nothing is known."""


class PassingError(FederationError):
    """Something failed that may go well when the same command is given again (exit code 75)."""
