"""Where examples come from: one string names a data set, another names a split of it."""
