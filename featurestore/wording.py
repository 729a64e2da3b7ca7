"""Numbers in sentences, for messages and pages."""


def counted(n: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 slide`` or ``2 slides``.

    Parameters
    ----------
    noun
        In the singular, with whatever stands between: ``tissue patch``. Its last word takes the plural in -s or -es.
    """
    # The ch of an epoch is spoken as k.
    takes_es = noun.endswith(("ch", "sh", "s", "x")) and not noun.endswith("epoch")
    ending = "" if n == 1 else "es" if takes_es else "s"
    return f"{n} {noun}{ending}"
