"""HOW DOES IT ANSWER? Decoding, predictions, a server, export, and plans of serving."""
