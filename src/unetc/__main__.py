"""Run the command line: `python -m unetc`."""

from unetc.cli import main

if __name__ == "__main__":
    main()
