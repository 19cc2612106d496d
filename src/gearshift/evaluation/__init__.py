"""What a run's images are worth and what they cost: features, distances, paired metrics, tables and the report."""
