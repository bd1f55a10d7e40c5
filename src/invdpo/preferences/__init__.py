"""Preference pairs: read in Pick-a-Pic v2's columns, encoded once, served by index."""
