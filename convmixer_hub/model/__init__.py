"""The network: the paper in PyTorch, and what makes it fast on a CPU."""
