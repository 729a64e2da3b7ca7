"""The page that reports are made of, and figures as SVG. Generic: each stage owns its own report.

May use: errors.
"""
