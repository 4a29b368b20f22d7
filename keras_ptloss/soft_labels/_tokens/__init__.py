"""Stored log-probabilities of tokens: sequences of different lengths."""
