"""The sections of a configuration file; :mod:`crosslm.config` is the whole."""
