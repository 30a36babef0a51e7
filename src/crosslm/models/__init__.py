"""Thin wrappers over transformers, peft and sentence-transformers."""
