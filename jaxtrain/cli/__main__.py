"""`python -m jaxtrain.cli`."""

from jaxtrain.cli.app import main

if __name__ == "__main__":
    main()
