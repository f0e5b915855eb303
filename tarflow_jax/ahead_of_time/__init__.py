"""What a TPU slice will do with a program, found without one: compiled, counted, timed."""
