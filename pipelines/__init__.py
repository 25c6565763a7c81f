"""Who talks to whom: one file a method, wiring only. `run` is what the command line calls."""
