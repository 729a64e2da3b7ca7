"""Compare the records with the published networks: stand-in files from published figures, read by other implementations.

It uses the records and the way on which every encoder is loaded, and nothing of how that way works. It needs no
weights and no network; transformers, where its classes are the published ones, comes with the extra ``check``.
"""
