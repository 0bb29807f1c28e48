"""The steps of a run and what happens between them."""
