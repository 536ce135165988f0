"""What the market costs over the same updates in one process."""
