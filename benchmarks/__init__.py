"""Measurements behind the speed claims; each folder's README holds its figures."""
