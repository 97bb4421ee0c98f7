"""`python -m dememo_jax` is the command `dememo`."""

from dememo_jax.cli import main

if __name__ == "__main__":
    main()
