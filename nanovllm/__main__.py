"""The program `nanovllm`, also as `python -m nanovllm`: Ctrl-C ends it quietly while it imports."""

import sys


def main() -> int:
    try:
        from nanovllm.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
