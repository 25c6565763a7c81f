"""Who talks to whom: one file a method, wiring only. `launch` is what the command line calls."""
