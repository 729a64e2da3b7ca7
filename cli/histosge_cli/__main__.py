"""``python -m histosge_cli`` is ``histosge``."""

from histosge_cli.main import main

if __name__ == "__main__":
    main()
