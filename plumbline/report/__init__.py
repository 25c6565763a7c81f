"""A run as one page: curves, tables, answers side by side."""
