"""``python -m gossamer.cli`` is the command ``gossamer``, for programs that start modules, such as torchrun."""

from gossamer.cli.app import main

if __name__ == "__main__":
    main()
