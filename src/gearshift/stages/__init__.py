"""Where noise levels part: the optimal denoiser of a data set, and the stage boundaries that follow from it."""
