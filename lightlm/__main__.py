"""`python -m lightlm`, which torchrun uses to start training processes."""

from lightlm.cli.app import main

if __name__ == "__main__":
    main()
