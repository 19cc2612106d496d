"""Finding what every call should compute, under a budget, by running the sampler on calibration noise."""
