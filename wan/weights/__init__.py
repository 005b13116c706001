"""Files of weights -> tensors: which are there, what they hold, and in what form they stay in memory."""
