"""Where the `growkit` command and `python -m growkit` start. From the first import on, Ctrl-C, a closed pipe and a
missing package end in a line, not in a traceback; so what is slow to import is imported in here."""

import os
import signal
import sys


def main(arguments=None):
    """Run the command and return its exit code: 0, 2 for wrong use, 130 for Ctrl-C, else 1."""
    before = signal.signal(signal.SIGINT, _stop)
    try:
        import click

        from growkit.cli import command

        try:
            code = command.main(arguments, prog_name="growkit", standalone_mode=False) or 0
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich"):
            raise
        print(f"growkit: the command needs {missing.name}: pip install {missing.name}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # by the flush; click sees those of its own writes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return 1
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(*_):
    """An exception in the middle of an import could be swallowed, or turned into another; leave at once."""
    os.write(2, b"\ninterrupted: nothing had finished\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
