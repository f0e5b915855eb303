"""Scores of a trained flow, the networks that some of them need, and sampling in bulk."""
