"""The command line as a module: `torchrun --nproc-per-node 2 -m hidrop_fx eval`."""

from hidrop_fx.cli import main

if __name__ == "__main__":
    main()
