"""python -m nsa_cli: the command line."""

from nsa_cli.cli.app import main

if __name__ == "__main__":
    main()
