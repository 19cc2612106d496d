"""What every part may lean on and what leans on none: errors, randomness, configs, run folders, launch, progress."""
