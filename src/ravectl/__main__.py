"""`python -m ravectl` is the same as `ravectl`."""

from ravectl.cli import main

if __name__ == "__main__":
    main()
