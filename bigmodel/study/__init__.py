"""Compares runs with each other: what a larger one would reach, and which one a budget buys."""
