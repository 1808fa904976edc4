"""Spawned workers that work through files, and a supervisor that notices every way a worker can end."""
