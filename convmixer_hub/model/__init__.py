"""The ConvMixer network, and what makes it fast on a CPU or a GPU."""
