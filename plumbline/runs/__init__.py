"""What a run directory holds, and its copy in a storage: parts, pairs, checkpoints, versions, promotions."""
