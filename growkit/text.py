"""Text from files: what a user names to train on."""

from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")


def read_text(path: Path) -> bytes:
    """A file, or every text file (`TEXT_SUFFIXES`) below a folder in order of name; ValueError where there is none."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{path}: has no text, expected files with the suffix {', '.join(TEXT_SUFFIXES)}")
    return b"\n".join(f.read_bytes() for f in files)


def doubts(text: bytes) -> str | None:
    """Why `text` may be no text, or None: bytes that are no UTF-8, or of which many are control characters."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.start < len(text) - 3:  # a file that is cut off within its last character is text
            return f"byte {error.start} is no UTF-8"
    controls = sum(text.count(bytes([code])) for code in (*range(9), *range(14, 32), 127))
    return f"{controls / len(text):.0%} of the bytes are control characters" if controls > 0.01 * len(text) else None
