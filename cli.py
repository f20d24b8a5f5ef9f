"""The command line from a checkout: `python cli.py ask scan.png "Is there effusion?"`."""

from medmoe_edge.cli import main

if __name__ == "__main__":
    main()
