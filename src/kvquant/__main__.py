"""``python -m kvquant`` is the command ``kvquant``."""

from .cli import main

if __name__ == "__main__":
    main()
