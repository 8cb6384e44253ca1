"""Answers beside those of their copies: which requests are copied, what a difference means, what was found."""
