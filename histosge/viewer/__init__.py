"""A local page with slides and gene maps on them: read on demand, served to this machine or written as files.

`collection` answers what a page may ask for, as plain values; `server` serves it, `export` writes the same answers as
files. The page itself is under ``static/``, plain JavaScript without a build step.
"""
