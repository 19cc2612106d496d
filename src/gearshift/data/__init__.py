"""Images, latents and labels. Pixels are decoded once into one uint8 array and mapped to [-1, 1] in one place."""
