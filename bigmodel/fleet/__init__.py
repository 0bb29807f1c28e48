"""HOW DOES IT SURVIVE? Supervision and restarts of a job's hosts, checks before it starts."""
