"""`python -m ncvsd_inverse.cli`: the same as the command `ncvsd`."""

from ncvsd_inverse.cli import main

if __name__ == "__main__":
    main()
