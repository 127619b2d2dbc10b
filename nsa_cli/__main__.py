"""python -m nsa_cli: the command line, and the entry that torchrun starts."""

from nsa_cli.cli.app import main

if __name__ == "__main__":
    main()
