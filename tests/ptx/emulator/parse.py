"""The text of a PTX module with one kernel, as statements; nothing is decided here about what they do."""

import re
from typing import NamedTuple

from .errors import Unsupported
from .values import bits_of


class Statement(NamedTuple):
    line: int  # of the PTX
    text: str
    where: str  # file:line of the source that it was compiled from
    guard: str | None  # predicate register
    negated: bool
    opcode: str
    operands: list[str]


class Listing(NamedTuple):
    name: str
    threads: int  # per program
    parameters: list[tuple[str, str]]  # name and type
    registers: dict[str, int]  # bits; 1 for predicates
    shared: list[str]  # names that stand for the start of shared memory
    labels: dict[str, int]  # index of the statement that follows
    statements: list[Statement]


def parse(ptx: str) -> Listing:
    """Raises Unsupported for directives other than those in Triton's output."""
    name, threads, parameters, shared = "", 0, [], []
    registers: dict[str, int] = {}
    labels: dict[str, int] = {}
    statements: list[Statement] = []
    files = dict(re.findall(r"^\s*\.file\s+(\d+)\s+\"(?:[^\"]*/)?([^\"/]*)\"", ptx, re.MULTILINE))
    where, depth = "?", 0
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.split("//")[0].strip()
        if not depth:  # in front of the body
            if match := re.match(r"\.visible \.entry (\w+)", text):
                name = match[1]
            elif match := re.match(r"\.param \.(\w+)(?: \.ptr.*)? (\w+),?$", text):
                parameters.append((match[2], match[1]))
            elif match := re.match(r"\.reqntid (\d+)", text):
                threads = int(match[1])
            elif match := re.match(r"\.extern \.shared .*?(\w+)\[\]", text):
                shared.append(match[1])
            elif ".shared" in text:
                raise Unsupported(f"line {number}: {text}")
            elif text == "{" and threads:
                depth = 1
            continue
        if text in ("{", "}"):
            depth += 1 if text == "{" else -1
            if not depth:
                break
        elif match := re.match(r"\.loc\s+(\d+) (\d+)", text):
            where = f"{files.get(match[1], '?')}:{match[2]}"
        elif match := re.match(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>;", text):
            width = 1 if match[1] == "pred" else bits_of(match[1])
            registers |= {f"%{match[2]}{i}": width for i in range(int(match[3]))}
        elif match := re.match(r"([$\w]+):$", text):
            labels[match[1]] = len(statements)
        elif text.startswith("."):
            if not text.startswith((".pragma", ".section")):
                raise Unsupported(f"line {number}: {text}")
        else:
            parts = filter(None, (part.strip() for part in text.split(";")))
            statements += [_statement(number, part, where) for part in parts]
    return Listing(name, threads, parameters, registers, shared, labels, statements)


def _statement(line: int, text: str, where: str) -> Statement:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)$", text)
    operands, depth, last, rest = [], 0, 0, match[4]
    for i, letter in enumerate(rest):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            operands.append(rest[last:i].strip())
            last = i + 1
    if rest[last:].strip():
        operands.append(rest[last:].strip())
    return Statement(line, text, where, match[2], bool(match[1]), match[3], operands)
