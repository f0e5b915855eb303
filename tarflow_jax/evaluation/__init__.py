"""Scores of a trained flow: bits per dimension, classification."""
