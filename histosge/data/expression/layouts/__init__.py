"""One file per layout of measured expression; `histosge.data.expression.find_expression` recognises which.

May use: errors, extras and the other modules of `histosge.data.expression`.
"""
