"""Topology and sharding rules: how a model is divided among ranks."""
