"""Predicts what a program costs on a TPU slice, without one: compiles it, counts, and times it."""
