"""A local page with slides and gene maps on them: read on demand, served to this machine or written as files.

`collection` gives everything that a page requests, as plain values; `server` serves it, `static_page` writes the same
as files. The page itself is under ``static/``, plain JavaScript without a build step.
"""
