"""Run the command line: `python -m unetc`."""

from .cli import main

if __name__ == "__main__":
    main()
