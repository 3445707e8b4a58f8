"""How it is learned: optimiser, step, devices, checkpoints, logs."""
