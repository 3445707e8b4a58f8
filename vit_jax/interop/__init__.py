"""Weights of other projects: reading, writing, and converting them for a model of ours."""
