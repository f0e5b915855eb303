"""Scores of a trained flow by name, the networks that some of them need, and samples in bulk."""
