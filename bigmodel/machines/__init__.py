"""What computers can do: datasheets of chips, energy counters, free memory."""
