"""Images and labels: decoded once into one uint8 array, mapped to [-1, 1] in one place."""
