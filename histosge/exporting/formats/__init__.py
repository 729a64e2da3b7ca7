"""One file per format that other tools open.

May use: errors, extras and the other modules of `histosge.exporting`.
"""
