"""CrossLM: a server's large language model and many clients' classifiers make each other better."""

__version__ = "0.1.0"

from crosslm.config import Config
from crosslm.config_file import load
from crosslm.errors import CrosslmError

__all__ = ["Config", "CrosslmError", "__version__", "load"]
