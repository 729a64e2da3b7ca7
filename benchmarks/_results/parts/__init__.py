"""One module a part of the record: how its figures are measured, and how its tables are written.

A module here declares `PARTS`, a tuple of `_results.part.Part`; nothing else has to know of it.
"""
