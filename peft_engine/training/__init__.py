"""Training: one loop for a group of members, its step, optimizer, checkpoints and guards."""
