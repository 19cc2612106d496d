"""Training: the Lightning module, the average of the weights, checkpoints, resume. Imported only by those who train."""
