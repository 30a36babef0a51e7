"""The life of a run: what it needs, keeps, measures and leaves behind, and what is done with it later."""
