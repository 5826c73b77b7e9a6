"""python -m moeret.cli."""

from moeret.cli.app import main

if __name__ == "__main__":
    main()
