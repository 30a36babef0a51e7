"""Labelled and plain texts: where they come from and who has which."""
