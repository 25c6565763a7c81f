"""The command line: the room above all others, which starts what they do."""
