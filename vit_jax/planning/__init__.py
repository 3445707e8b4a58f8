"""The needs and the estimated time of a compiled program, without running it."""
