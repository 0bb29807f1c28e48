"""HOW DO RUNS COMPARE? Sweeps priced before they start, scaling laws, and a page for every run."""
