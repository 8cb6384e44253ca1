"""Quantised models of ours as Hugging Face directories that other engines load."""
