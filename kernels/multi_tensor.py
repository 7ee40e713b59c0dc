"""One launch for any number of tensors: a table on the device says which chunk of which tensor each program handles.

A list of T tensors is cut into C chunks of CHUNK elements, none of which spans two tensors. The table has a part that
is made once per list of shapes,

    facts  int64 [3, T]   of each tensor: numel, parameter index, global index of its first element
    chunks int32 [2, C]   of each chunk: its tensor, its number within the tensor

and the addresses of the tensors, int64 [lists, T], of which only the lists that moved since the last launch are sent
again. Offsets are 64-bit throughout.
"""

import array
import functools
from operator import attrgetter

import torch
import triton
import triton.language as tl

from growkit import kernels, reference

CHUNK = 4096

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODES = {torch.uint8: tl.uint8, torch.int8: tl.int8}
ROW = reference.CODES_PER_SCALE


@triton.jit
def chunk_of(chunks, count, c):
    """Tensor that chunk c lies in, and the chunk's number within the tensor; both int64."""
    return tl.load(chunks + c).to(tl.int64), tl.load(chunks + count + c).to(tl.int64)


@triton.jit
def fact(facts, tensors, t, k: tl.constexpr):
    """Of tensor t: k = 0 numel, 1 parameter index, 2 global index of its first element."""
    return tl.load(facts + k * tensors + t)


@triton.jit
def address(addresses, tensors, t, k: tl.constexpr):
    """Address of tensor t of list k, as an integer."""
    return tl.load(addresses + k * tensors + t)


@triton.jit
def aligned(where, dtype: tl.constexpr):
    """Pointer to an address that is a multiple of 16, so that accesses can be 128 bits wide."""
    return tl.multiple_of(where.to(tl.pointer_type(dtype)), 16)


class Lists:
    """Equally long lists of tensors, equal in shape within each position, made ready for one launch.

    lists: {name: list of tensors}; a `TensorList` is checked again only when a tensor lies elsewhere than before.
    written: names of those the kernel writes. parameter, offset: what the random bits of each tensor are keyed by, for
    a kernel that draws any. codes: {name of a list of 8-bit codes: name of the list of their scales, two for each ROW
    elements of a tensor}.
    arguments: what every kernel takes first, (addresses, facts, chunks, T, C). chunks: C. dtypes: of each list, as the
    kernel names them.

    Elementwise kernels walk tensors in memory order where all lists agree in a dense layout. Where they do not, or
    where random bits belong to the row-major index and the layout is another, contiguous copies take the tensors'
    place, and `launch` writes those of the lists in `written` back. Raises ValueError, which names the list, for
    unequal lengths or numbers of elements and for more than one device or dtype per list.
    """

    def __init__(self, op, lists, *, written=(), parameter=(), offset=(), codes=None):
        codes = codes or {}
        addresses = [list(map(torch.Tensor.data_ptr, tensors)) for tensors in lists.values()]
        first, found = next(iter(lists.values())), []
        for (name, tensors), there in zip(lists.items(), addresses, strict=True):
            known = getattr(tensors, "known", None)
            if known is None or known.addresses != there:
                known = _Checked(op, name, tensors, first, there)
                if isinstance(tensors, kernels.TensorList):
                    tensors.known = known
            found.append(known)
            allowed = CODES if name in codes else DTYPES
            if known.dtype not in allowed:
                raise TypeError(f"{op}: {name} is {known.dtype}, expected one of {', '.join(map(str, allowed))}")
            numel = _scales(found[0].numel) if name in codes.values() else found[0].numel
            if known.numel != numel:
                pairs = enumerate(zip(known.numel, numel, strict=True))
                k, (given, expected) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
                raise ValueError(f"{op}: {name}[{k}] has {given} elements, expected {expected}")
        self.dtypes = [(DTYPES | CODES)[each.dtype] for each in found]
        self._copies, self._tensors = [], None
        if not all(each.contiguous for each in found):
            self._tensors = self._dense(lists, written, numbered=bool(parameter))  # copies must live until the launch
            addresses = [list(map(torch.Tensor.data_ptr, tensors)) for tensors in self._tensors]
        facts = found[0].numel, tuple(parameter), tuple(offset)
        key = found[0].device, CHUNK, *facts
        table = _tables.get(key)
        if table is None:
            table = _Table(found[0].device, *facts)
            if len(_tables) >= _KEPT:
                del _tables[next(iter(_tables))]
            _tables[key] = table
        self.chunks = table.chunks.shape[1]
        self.arguments = table.addresses(addresses), table.facts, table.chunks, len(first), self.chunks

    def launch(self, kernel, *arguments, block, warps, programs=None):
        """Run the kernel over all chunks, in at most so many programs, and write copies back."""
        if self.chunks:
            with torch.cuda.device_of(self.arguments[0]):
                kernel[(min(self.chunks, programs or self.chunks),)](
                    *self.arguments, *arguments, CHUNK, block, num_warps=warps, enable_fp_fusion=False
                )
        for t, copy in self._copies:
            t.copy_(copy)

    def _dense(self, lists, written, numbered):
        result = [list(tensors) for tensors in lists.values()]
        for i, tensors in enumerate(zip(*result, strict=True)):
            if not numbered and len({t.stride() for t in tensors}) == 1 and _is_dense(tensors[0]):
                continue
            for name, t, own in zip(lists, tensors, result, strict=True):
                if not t.is_contiguous():
                    own[i] = t.contiguous()
                    if name in written:
                        self._copies.append((t, own[i]))
        return result


def _is_dense(t):
    """Whether the elements fill one stretch of memory without gap or overlap."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= n
    return True


# Tables, by what they are made from; beyond _KEPT the oldest goes. None holds a tensor of a caller.
_KEPT = 64
_tables: dict = {}
# What CUDA graphs read at every replay. Nothing tells when a graph is gone, so it stays.
_captured: list = []


@functools.lru_cache(_KEPT)
def _scales(numel):
    return tuple(2 * -(-n // ROW) for n in numel)


class _Checked:
    """What the tensors of a list were found to be, all of one dtype and device."""

    def __init__(self, op, name, tensors, first, addresses):
        if len(tensors) != len(first):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, expected {len(first)}")
        self.dtype, self.device = tensors[0].dtype, first[0].device
        # The quicker question where it tells devices apart: -1 is the answer of all but GPUs.
        place = torch.Tensor.get_device if self.device.type == "cuda" else attrgetter("device")
        if len(set(map(attrgetter("dtype"), tensors))) > 1 or set(map(place, tensors)) != {place(first[0])}:
            i = next(i for i, t in enumerate(tensors) if (t.dtype, t.device) != (self.dtype, self.device))
            raise ValueError(
                f"{op}: {name}[{i}] is {tensors[i].dtype} on {tensors[i].device}, expected {self.dtype} on "
                f"{self.device} as the first: one call per dtype and device"
            )
        self.numel = tuple(map(torch.Tensor.numel, tensors))
        self.contiguous = all(map(torch.Tensor.is_contiguous, tensors))
        self.addresses = addresses


_RUN_ONCE = "CUDA graph capture: run the same call once, outside of any capture, before each capture"


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Table:
    def __init__(self, device, numel, parameter, offset):
        if _capturing(device):
            raise RuntimeError(_RUN_ONCE)
        zeros = (0,) * len(numel)
        counts = torch.tensor([-(-n // CHUNK) for n in numel])
        tensor = torch.arange(len(numel)).repeat_interleave(counts)
        number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
        self.facts = torch.tensor([numel, parameter or zeros, offset or zeros]).to(device)
        self.chunks = torch.stack((tensor, number)).to(device, torch.int32)
        self._sent = {}  # (number of lists, stream) -> (addresses on the device, the lists that they were sent from)
        self._spare = {}  # number of lists -> pinned memory for the next capture, which must not allocate any

    def addresses(self, found):
        """`found`, lists of addresses, as int64 [lists, T] on the device."""
        device, shape = self.facts.device, (len(found), len(found[0]))
        cuda = device.type == "cuda"
        if _capturing(device):
            return self._capture(found)
        if cuda and len(found) not in self._spare:
            self._spare[len(found)] = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        # One copy per stream: a step on another stream must not overwrite what a kernel of this one still reads.
        key = len(found), torch.cuda.current_stream(device).cuda_stream if cuda else 0
        if key not in self._sent:
            if cuda:  # a table that goes must not be overwritten while any stream reads it
                self.facts.record_stream(torch.cuda.current_stream(device))
                self.chunks.record_stream(torch.cuda.current_stream(device))
            self._sent[key] = torch.empty(shape, dtype=torch.int64, device=device), [None] * len(found)
        there, sent = self._sent[key]
        for k, addresses in enumerate(found):
            if addresses != sent[k]:
                here = _packed(addresses)
                # torch's allocator of pinned memory uses this again only once the copy is done.
                there[k].copy_(here.pin_memory() if cuda else here, non_blocking=True)
                sent[k] = addresses
        return there

    def _capture(self, found):
        """Addresses for a graph, which sends them anew at each replay: from memory, to memory, that are its own."""
        if len(found) not in self._spare:
            raise RuntimeError(_RUN_ONCE)
        here = self._spare.pop(len(found))
        for row, addresses in zip(here, found, strict=True):
            row.copy_(_packed(addresses))
        there = torch.empty(here.shape, dtype=torch.int64, device=self.facts.device)
        _captured.append((self, here, there.copy_(here, non_blocking=True)))
        return there


def _packed(addresses):
    return torch.frombuffer(array.array("q", addresses), dtype=torch.int64)
