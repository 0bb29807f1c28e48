"""Checkpoints: saved without stopping, restored onto any mesh, never restored damaged; where a run starts."""
