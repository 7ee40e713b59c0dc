"""The text of a kernel in a PTX module, as statements; nothing is decided here about what they do."""

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


class Parameter(NamedTuple):
    name: str
    kind: str | None  # type; None: a structure
    offset: int  # from the first parameter's start
    size: int


class Listing(NamedTuple):
    name: str
    threads: int | None  # per program, where the kernel is made for one number of them
    parameters: list[Parameter]
    registers: dict[str, int]  # bits; 1 for predicates
    shared: dict[str, int]  # names of shared memory and where it starts
    static: int  # bytes of shared memory beside what a launch asks for
    labels: dict[str, int]  # index of the statement that follows
    statements: list[Statement]


def _entry(lines: list[str], name: str | None) -> tuple[str, set[int]]:
    """The kernel of that name, None: the only one, and the lines of the module's other kernels."""
    matches = [re.match(r"(?:\.visible )?\.entry (\w+)", line) for line in lines]
    starts = [(i, match[1]) for i, match in enumerate(matches) if match]
    found = [k for k, (_, known) in enumerate(starts) if name in (None, known)]
    if len(found) != 1:
        raise Unsupported(f"kernel {name} among {[known for _, known in starts]}")
    ends = [i for i, _ in starts[1:]] + [len(lines)]
    return starts[found[0]][1], {*range(starts[0][0], len(lines))} - {*range(starts[found[0]][0], ends[found[0]])}


def parse(ptx: str, name: str | None = None) -> Listing:
    """name: of the kernel in a module of several. Raises Unsupported for directives that no kernel here has."""
    lines = ptx.splitlines()
    name, elsewhere = _entry(lines, name)
    threads, parameters, dynamic, shared, static = None, [], [], {}, 0
    registers: dict[str, int] = {}
    labels: dict[str, int] = {}
    statements: list[Statement] = []
    files = dict(re.findall(r"^\s*\.file\s+(\d+)\s+\"(?:[^\"]*/)?([^\"/]*)\"", ptx, re.MULTILINE))
    where, depth = "?", 0
    for number, line in enumerate(lines, 1):
        text = line.split("//")[0].strip()
        if number - 1 in elsewhere:
            continue
        if not depth:  # in front of the body
            if match := re.match(r"\.param \.(\w+)(?: \.ptr.*)? (\w+),?$", text):
                size = bits_of(match[1]) // 8
                parameters.append(_parameter(parameters, match[2], match[1], size, size))
            elif match := re.match(r"\.param \.align (\d+) \.b8 (\w+)\[(\d+)\],?$", text):
                parameters.append(_parameter(parameters, match[2], None, int(match[3]), int(match[1])))
            elif match := re.match(r"\.reqntid (\d+)", text):
                threads = int(match[1])
            elif match := re.match(r"\.extern \.shared .*?(\w+)\[\]", text):
                dynamic.append(match[1])
            elif ".shared" in text:
                raise Unsupported(f"line {number}: {text}")
            elif text == "{":
                depth = 1
            continue
        if match := re.match(r"\{\s*([a-z].*;)\s*\}$", text):  # one instruction that was written out in the source
            text = match[1]
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
        elif match := re.match(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", text):
            shared[match[2]] = -(-static // int(match[1])) * int(match[1])
            static = shared[match[2]] + int(match[3])
        elif text.startswith("."):
            if not text.startswith((".pragma", ".section")):
                raise Unsupported(f"line {number}: {text}")
        else:
            parts = filter(None, (part.strip() for part in text.split(";")))
            statements += [_statement(number, part, where) for part in parts]
    static = -(-static // 16) * 16
    shared |= dict.fromkeys(dynamic, static)
    return Listing(name, threads, parameters, registers, shared, static, labels, statements)


def _parameter(before: list[Parameter], name: str, kind: str | None, size: int, alignment: int) -> Parameter:
    end = before[-1].offset + before[-1].size if before else 0
    return Parameter(name, kind, -(-end // alignment) * alignment, size)


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
