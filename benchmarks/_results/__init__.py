"""The record of figures in README.md and docs/, its parts, and the pages that are written from it.

`part` says what a part and a table are, `parts/` holds them, `catalogue` finds them, `taking` reads the JSON of other
benchmarks, `record` stores the record, and `pages` writes the marked blocks.
"""
