"""DP-SGD for an SLM and its budget, planted sentences, a client's leak check, and what a run tells of all that."""
