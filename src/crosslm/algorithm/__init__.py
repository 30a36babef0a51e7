"""The paper's equations and our additions to them, as pure functions."""
