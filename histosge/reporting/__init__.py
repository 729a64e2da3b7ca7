"""The page that reports are made of, and pictures as PNG bytes. Generic: each stage owns its own report.

May use: errors.
"""
