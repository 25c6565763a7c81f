"""Which process of a run gets which share of which card: the numbers that a config leaves at `auto`."""
