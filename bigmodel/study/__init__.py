"""HOW DO RUNS COMPARE? Sweeps priced before they start, and scaling laws."""
