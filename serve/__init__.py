"""The OpenAI-compatible endpoint over published versions."""
