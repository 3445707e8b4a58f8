"""Several devices and several processes as one: the mesh, who takes part, how they end."""
