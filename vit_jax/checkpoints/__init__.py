"""Our own checkpoints: written, verified, chosen among, and opened as a trained model."""
