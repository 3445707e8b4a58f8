"""How good a model is: exact averages, and probes of its representation."""
