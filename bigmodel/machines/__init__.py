"""Hardware: datasheets of chips, energy counters, free memory."""
