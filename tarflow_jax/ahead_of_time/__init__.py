"""Predicts the memory and time of a program on a TPU slice, on a machine without TPUs."""
