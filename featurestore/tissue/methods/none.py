"""No search for tissue: every patch is encoded, glass included."""

from featurestore.tissue.tissue_method import TissueMethod

RECORD = TissueMethod("none", "every patch counts as tissue", mask=None)
