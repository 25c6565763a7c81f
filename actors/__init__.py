"""Long-lived processes: plain classes, one a module. They become Ray actors in `spawn` and nowhere else."""
