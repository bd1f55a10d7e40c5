"""Experiments beyond the study's runs: one file each, pure functions from models and latents to tables."""
