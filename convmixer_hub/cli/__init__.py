"""The command `convmixer`."""
