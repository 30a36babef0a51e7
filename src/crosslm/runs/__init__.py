"""The life of a run: what it needs, keeps and measures, and what is done with it when it is finished."""
