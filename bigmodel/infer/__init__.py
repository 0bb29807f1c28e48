"""HOW DOES IT ANSWER? Decoding, predictions, the server, export, and what serving will cost."""
