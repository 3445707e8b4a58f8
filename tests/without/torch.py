"""Stands in for torch in processes that do not need it; tensorboardX would import it."""

raise ImportError("not needed here")
