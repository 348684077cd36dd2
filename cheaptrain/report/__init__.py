"""What people look at: the plan before a run, and the packed rows it will read."""
