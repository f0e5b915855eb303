"""Sampling: decoding by schedule, densities of samples, completion and interpolation."""
