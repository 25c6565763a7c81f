"""How a prompt with K answers becomes log-probs, and an answer a classifier's score."""
