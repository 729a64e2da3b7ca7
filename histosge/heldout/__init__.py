"""What is held out and how well it is predicted: splits, the leakage guard and metrics. Arithmetic only.

It loads and fits nothing.

May use: errors and `histosge.data`.
"""
