"""Every section of a config, the file that it is read from, its reference, and what a run asks of its machines."""
