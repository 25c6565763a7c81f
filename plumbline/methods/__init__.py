"""The papers' formulas: losses, selection, theory, evaluation (METHODS.md)."""
