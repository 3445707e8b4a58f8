"""Several devices and processes as one run: the mesh, sharding, start and end of processes."""
