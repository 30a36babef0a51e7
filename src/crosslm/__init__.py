"""CrossLM: a server's large language model and many clients' classifiers make each other better."""

__version__ = "0.1.0"
