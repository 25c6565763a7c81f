"""What a learner's Ray Train workers do."""
