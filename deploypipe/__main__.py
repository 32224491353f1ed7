"""`python -m deploypipe` is `deploypipe`."""

from deploypipe.cli.main import main

if __name__ == "__main__":
    main()
