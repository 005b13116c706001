"""`wan-serve`: a page and an API for chains. It calls the commands and reads their folders; nothing knows it.

The process that answers requests imports no PyTorch. Another one (`worker`) owns the models and makes one chain after
the other, and short-lived ones (`decode`, `plan`) look at what clients send.
"""
