"""What is minimised in training."""
