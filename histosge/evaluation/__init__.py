"""Scores of models on held-out spots, with controls beside them, and the report.

May use: every other folder of the package but `viewer`; nothing but `demo` and the command line uses it.
"""
