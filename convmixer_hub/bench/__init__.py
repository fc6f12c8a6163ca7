"""Measurements of what is claimed: speed, and what choices in training are worth."""
