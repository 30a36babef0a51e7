"""The paper's experiments (section 5) again: what to run, running it, and its tables and plots."""
