"""Readers, rows and their checks, templates and principles, what fits."""
