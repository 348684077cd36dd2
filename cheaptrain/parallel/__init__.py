"""Many processes as one run: the mesh, the sharded model, and what the processes say to each other."""
