"""`python -m pyllm` is the `pyllm` command."""

from pyllm.cli import main

if __name__ == "__main__":
    main()
