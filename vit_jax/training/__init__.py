"""How a model is trained: the run, the update, the optimiser, the log."""
