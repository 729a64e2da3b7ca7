"""One file per family of slide formats, each behind the protocol `featurestore.slides.protocol.Slide`.

May use: errors, location and the other modules of `featurestore.slides` but `open_slide`, which uses the readers.
"""
