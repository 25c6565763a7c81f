"""The OpenAI-compatible endpoint over published versions. It holds nothing yet."""
