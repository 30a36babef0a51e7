"""Differentially private training of an SLM, its budget, and the attacks that test what a run gives away."""
