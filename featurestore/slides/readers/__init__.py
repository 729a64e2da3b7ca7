"""One file per family of slide formats, each with its ``RECORD``; the registry reads this folder.

May use: errors, location and the other modules of `featurestore.slides` but `open_slide`, which uses the readers.
"""
