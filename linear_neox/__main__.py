"""`python -m linear_neox COMMAND`: the console command `linear-neox`, also from a checkout without installation."""

from linear_neox.cli import main

if __name__ == "__main__":
    main()
