import numpy as np

SECTOR = 32  # bytes that memory moves at once


class Counts:
    """What programs did. Instructions and accesses: of threads. Sectors: pieces of memory that the warps asked for."""

    def __init__(self):
        self.programs = 0
        self.divergent = 0  # branches that some threads of a program took and others did not
        self.barriers = 0  # of programs
        self.shared = 0  # bytes that threads moved to and from shared memory
        self.instructions: dict[str, int] = {}
        self.accesses: dict[tuple[str, int], int] = {}  # ("load" or "store", bytes of a thread) -> number
        self.sectors = {"load": 0, "store": 0}
        self.requests = {"load": 0, "store": 0}  # of warps

    def instruction(self, opcode: str, threads: int) -> None:
        self.instructions[opcode] = self.instructions.get(opcode, 0) + threads

    def access(self, kind: str, addresses: np.ndarray, warps: np.ndarray, size: int) -> None:
        """An access of `size` bytes to each address; warps: in ascending order."""
        self.accesses[kind, size] = self.accesses.get((kind, size), 0) + len(addresses)
        # Addresses have 47 bits.
        self.sectors[kind] += len(np.unique(addresses // np.uint64(SECTOR) | warps.astype(np.uint64) << np.uint64(42)))
        self.requests[kind] += 1 + int(np.count_nonzero(np.diff(warps)))

    def add(self, other: "Counts") -> None:
        for name in ("programs", "divergent", "barriers", "shared"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("instructions", "accesses", "sectors", "requests"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value

    @property
    def total(self) -> int:
        return sum(self.instructions.values())

    def wide(self, kind: str) -> int:
        """Bytes moved by accesses of at least 128 bits."""
        return sum(n * size for (k, size), n in self.accesses.items() if k == kind and size >= 16)
