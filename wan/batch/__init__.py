"""Many videos by many workers: a list of rows, a chain each, on the GPUs of one machine or of a Ray cluster.

Only `crew.py` imports Ray.
"""
