"""Replicas: one trunk in several processes, joined by torch.distributed."""
